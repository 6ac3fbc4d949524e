"""Checks what a finished task claims: the whole record log, and that what the registry shows follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tiltyard.audit import Audit, Claim, Record, audit
from tiltyard.registry.v1 import leaderboard_pb2, submission_pb2
from tiltyard.type.v1 import evaluation_pb2

_SHOWN_SCORES = "every score that the registry shows is in the log"


@dataclass(frozen=True)
class Check:
    """One claim, whether it holds, and if not, why."""

    claim: str
    passed: bool
    detail: str = ""


def verify(
    record: Record, submissions: Sequence[submission_pb2.Submission], leaderboard: leaderboard_pb2.Leaderboard
) -> list[Check]:
    """Every claim with its verdict. In a demo each has something to be checked on, so that one without fails."""
    found = audit(record, shown=[leaderboard])
    checks = [
        Check(f"{each.claim} ({each.count})", True)
        if each.passed and each.count
        else Check(each.claim, False, str(each.failure) if each.failure else "there is nothing to check")
        for each in found.checks
    ]
    return [*checks, _shown_scores(record, submissions, found)]


def _shown_scores(record: Record, submissions: Sequence[submission_pb2.Submission], found: Audit) -> Check:
    if any(failure.claim is Claim.ROOT for failure in found.failures):
        return Check(_SHOWN_SCORES, False, "the log cannot be read")
    logged = {
        (entry.score_concluded.submission, entry.score_concluded.score.round): entry.score_concluded.score
        for _, entry in record.of_kind("score_concluded")
    }
    scored = [each for each in submissions if each.state == evaluation_pb2.SUBMISSION_STATE_SCORED]
    for each in scored:
        if logged.get((each.name, each.score.round)) != each.score:
            return Check(_SHOWN_SCORES, False, f"the log has another score of {each.name}, or none")
    return Check(f"{_SHOWN_SCORES} ({len(scored)})", True)
