"""Checks what a finished task claims against the record log: everything that anyone can recompute."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from google.protobuf.message import DecodeError

from tiltyard.client import Client, persist
from tiltyard.commitments import evaluation_seal, matches, submission_commitment
from tiltyard.receipts import ReceiptInvalid, verify_receipt
from tiltyard.registry.v1 import leaderboard_pb2, log_pb2, submission_pb2
from tiltyard.scoring import lower_median
from tiltyard.statements import InvalidSignature, open_statement
from tiltyard.transparency import leaf_hash, parse_checkpoint, root_hash, verify_note
from tiltyard.type.v1 import draw_pb2, envelope_pb2, evaluation_pb2
from tiltyard.type.v1 import log_pb2 as log_type_pb2

_PAGE = 1000


class Wrong(Exception):
    """Something that the record says does not follow from the rest of it."""


@dataclass(frozen=True)
class Check:
    """One claim, whether it holds, and if not, why."""

    claim: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Record:
    """The log as it was downloaded: its checkpoint and the bytes of every leaf in order."""

    checkpoint: log_pb2.Checkpoint
    leaves: tuple[bytes, ...]

    @cached_property
    def entries(self) -> tuple[log_type_pb2.LogEntry, ...]:
        """The leaves read. Raises Wrong for bytes that are no entry."""
        try:
            return tuple(log_type_pb2.LogEntry.FromString(leaf) for leaf in self.leaves)
        except DecodeError as error:
            raise Wrong("a leaf is not a LogEntry") from error

    @property
    def genesis(self) -> log_type_pb2.Genesis:
        """Leaf 0. Raises Wrong when it is something else."""
        if not self.entries or self.entries[0].WhichOneof("entry") != "genesis":
            raise Wrong("leaf 0 is not the genesis")
        return self.entries[0].genesis

    def of_kind(self, kind: str) -> Iterator[tuple[int, log_type_pb2.LogEntry]]:
        """Entries of one kind with their indices."""
        return ((index, entry) for index, entry in enumerate(self.entries) if entry.WhichOneof("entry") == kind)

    def draws(self) -> list[draw_pb2.DrawReceipt]:
        """The last receipt of each draw."""
        return list({entry.draw.draw: entry.draw for _, entry in self.of_kind("draw")}.values())


async def fetch_record(client: Client) -> Record:
    """Downloads the log up to its present checkpoint."""
    checkpoint = (await persist(lambda: client.log.GetCheckpoint(log_pb2.GetCheckpointRequest()))).checkpoint
    leaves: list[bytes] = []
    while len(leaves) < checkpoint.size:
        request = log_pb2.ListEntriesRequest(
            start_index=len(leaves), page_size=min(_PAGE, checkpoint.size - len(leaves))
        )
        page = await _leaves(client, request)
        if not page:
            break
        leaves += page
    return Record(checkpoint, tuple(leaves))


async def _leaves(client: Client, request: log_pb2.ListEntriesRequest) -> list[bytes]:
    return [leaf.entry for leaf in (await persist(lambda: client.log.ListEntries(request))).leaves]


@dataclass
class _Task:
    """What the log says of one task, gathered from checked envelopes."""

    commits: dict[str, envelope_pb2.CommitStatement] = field(default_factory=dict)
    reveals: dict[str, tuple[int, envelope_pb2.RevealStatement]] = field(default_factory=dict)
    seals: dict[str, envelope_pb2.SealStatement] = field(default_factory=dict)
    reports: dict[str, envelope_pb2.EvaluationReport] = field(default_factory=dict)


def verify(
    record: Record,
    task: str,
    submissions: Sequence[submission_pb2.Submission],
    leaderboard: leaderboard_pb2.Leaderboard,
) -> list[Check]:
    """Everything that is claimed about `task`, each claim with its verdict."""
    found = _Task()
    return [
        _check("the checkpoint's root is the root of all leaves, and its note is signed", lambda: _root(record)),
        _check("every envelope in the log is signed by whom it names", lambda: _envelopes(record, found)),
        _check("every revealed model is the one committed to", lambda: _commitments(found)),
        _check("every opened report is the one sealed", lambda: _seals(record, found)),
        _check(
            "every draw follows from the reveal, the selector's signature and the pool", lambda: _draws(record, found)
        ),
        _check("every score is the lower median of the opened reports", lambda: _scores(record, found, submissions)),
        _check("the leaderboard follows from the scores", lambda: _leaderboard(leaderboard, submissions, task)),
    ]


def _check(claim: str, work: Callable[[], int]) -> Check:
    try:
        count = work()
    except (Wrong, ValueError) as error:
        return Check(claim, False, str(error))
    return Check(f"{claim} ({count})", True) if count else Check(claim, False, "there is nothing to check")


def _demand(true: bool, otherwise: str) -> None:
    if not true:
        raise Wrong(otherwise)


def _root(record: Record) -> int:
    checkpoint, genesis = record.checkpoint, record.genesis
    _demand(len(record.leaves) == checkpoint.size, f"{len(record.leaves)} leaves came, {checkpoint.size} are signed")
    root = root_hash([leaf_hash(leaf) for leaf in record.leaves])
    _demand(root == checkpoint.root_hash, "the leaves give another root than the checkpoint's")
    noted = parse_checkpoint(verify_note(checkpoint.note, name=genesis.origin, public_key=genesis.log_key))
    _demand((noted.size, noted.root) == (checkpoint.size, root), "the note signs another tree")
    return len(record.leaves)


def _envelopes(record: Record, found: _Task) -> int:
    checked = 0
    for index, entry in enumerate(record.entries):
        try:
            checked += _envelope(index, entry, record.genesis.origin, found)
        except (InvalidSignature, ValueError) as error:
            raise Wrong(f"leaf {index}: {error}") from error
    return checked


def _envelope(index: int, entry: log_type_pb2.LogEntry, origin: str, found: _Task) -> bool:
    """Checks and gathers the statement of an entry, if it holds one."""
    kind = entry.WhichOneof("entry")
    if kind == "membership_changed" and entry.membership_changed.HasField("statement"):
        join, signer = open_statement(entry.membership_changed.statement, envelope_pb2.JoinStatement)
        _signed(index, origin, join.origin, join.participant, signer)
    elif kind == "submission_committed":
        commit, signer = open_statement(entry.submission_committed.statement, envelope_pb2.CommitStatement)
        _signed(index, origin, commit.origin, commit.participant, signer)
        found.commits[entry.submission_committed.submission] = commit
    elif kind == "submission_revealed":
        reveal, signer = open_statement(entry.submission_revealed.statement, envelope_pb2.RevealStatement)
        name = entry.submission_revealed.submission
        _demand(name in found.commits, f"leaf {index} reveals {name}, which nobody committed to")
        _signed(index, origin, reveal.origin, found.commits[name].participant, signer)
        _demand(reveal.submission == name, f"leaf {index} holds the reveal of {reveal.submission}")
        found.reveals[name] = (index, reveal)
    elif kind == "evaluation_sealed":
        seal, signer = open_statement(entry.evaluation_sealed.statement, envelope_pb2.SealStatement)
        _signed(index, origin, seal.origin, _validator_of(seal.assignment), signer)
        found.seals[entry.evaluation_sealed.evaluation] = seal
    elif kind == "evaluation_opened":
        report, signer = open_statement(entry.evaluation_opened.report, envelope_pb2.EvaluationReport)
        _signed(index, origin, report.origin, _validator_of(report.assignment), signer)
        found.reports[entry.evaluation_opened.evaluation] = report
    elif kind == "endorsement_changed":
        said, signer = open_statement(entry.endorsement_changed.statement, envelope_pb2.EndorsementStatement)
        _signed(index, origin, said.origin, said.endorser, signer)
    elif kind == "owner_bound":
        bound, signer = open_statement(entry.owner_bound.statement, envelope_pb2.OwnerStatement)
        _signed(index, origin, bound.origin, bound.owner, signer)
    else:
        return False
    return True


def _signed(index: int, origin: str, named_origin: str, participant: str, signer: str) -> None:
    _demand(named_origin == origin, f"leaf {index} is of another arena: {named_origin}")
    _demand(participant == f"participants/{signer}", f"leaf {index} was signed by {signer}, not by {participant}")


def _validator_of(assignment: str) -> str:
    return f"participants/{assignment.rpartition('-')[2]}"


def _commitments(found: _Task) -> int:
    for name, (_, reveal) in found.reveals.items():
        commit = found.commits[name]
        _demand(name.startswith(f"{commit.task}/submissions/"), f"{name} was committed to for {commit.task}")
        expected = submission_commitment(
            origin=commit.origin,
            task=commit.task,
            participant=commit.participant,
            model_digest=reveal.model_digest,
            salt=reveal.salt,
        )
        _demand(matches(expected, commit.commitment), f"{name} was committed to with another model or salt")
    return len(found.reveals)


def _seals(record: Record, found: _Task) -> int:
    checked = 0
    for index, entry in record.of_kind("evaluation_opened"):
        opened = entry.evaluation_opened
        _demand(opened.evaluation in found.seals, f"leaf {index} opens {opened.evaluation}, which was never sealed")
        seal = found.seals[opened.evaluation]
        _demand(
            seal.assignment == opened.evaluation.replace("/evaluations/", "/assignments/"),
            f"{opened.evaluation} was sealed for {seal.assignment}",
        )
        expected = evaluation_seal(assignment=seal.assignment, report=opened.report.payload, salt=opened.salt)
        _demand(matches(expected, seal.seal), f"{opened.evaluation} is not what was sealed")
        checked += 1
    return checked


def _draws(record: Record, found: _Task) -> int:
    selector = record.genesis.selector_key
    receipts = record.draws()
    for receipt in receipts:
        _demand(receipt.submission in found.reveals, f"{receipt.draw} is for {receipt.submission}, never revealed")
        index, reveal = found.reveals[receipt.submission]
        if receipt.round == 1:
            _demand(
                receipt.anchor == leaf_hash(record.leaves[index]),
                f"{receipt.draw} is not anchored in the reveal's leaf",
            )
        _demand(receipt.reveal_salt == reveal.salt, f"{receipt.draw} has another salt than the reveal")
        try:
            verify_receipt(receipt, selector_key=selector)
        except ReceiptInvalid as error:
            _demand(False, f"{receipt.draw}: {error.reason}")
    return len(receipts)


def _scores(record: Record, found: _Task, submissions: Sequence[submission_pb2.Submission]) -> int:
    scores = {
        (entry.score_concluded.submission, entry.score_concluded.score.round): entry.score_concluded.score
        for _, entry in record.of_kind("score_concluded")
    }
    for (name, round_), score in scores.items():
        _demand(bool(score.evaluations), f"the score of {name} names no evaluations")
        _demand(name in found.reveals, f"{name} was scored but never revealed")
        reports = []
        for evaluation in score.evaluations:
            _demand(evaluation.startswith(f"{name}/evaluations/{round_}-"), f"{evaluation} is not one of {name}")
            _demand(evaluation in found.reports, f"{evaluation} is counted for {name} but was never opened")
            report = found.reports[evaluation]
            _, reveal = found.reveals[name]
            _demand(report.model_digest == reveal.model_digest, f"{evaluation} is about another model than {name}")
            reports.append(report)
        if score.outcome != evaluation_pb2.SCORE_OUTCOME_SCORED:
            continue
        counts = [report.counts for report in reports if report.HasField("counts")]
        median = lower_median([each.correct for each in counts])
        _demand(score.correct == median, f"{name} scored {score.correct}, the lower median is {median}")
        _demand(
            all(each.total == score.total and 0 <= each.correct <= each.total for each in counts),
            f"the counts of {name} do not add up",
        )
    for submission in submissions:
        if submission.state == evaluation_pb2.SUBMISSION_STATE_SCORED:
            logged = scores.get((submission.name, submission.score.round))
            _demand(
                logged is not None
                and (logged.correct, logged.total) == (submission.score.correct, submission.score.total),
                f"the log has no such score of {submission.name}",
            )
    return len(scores)


def _leaderboard(
    board: leaderboard_pb2.Leaderboard, submissions: Sequence[submission_pb2.Submission], task: str
) -> int:
    _demand(board.task == task, f"the leaderboard is of {board.task}")
    best: dict[str, submission_pb2.Submission] = {}
    # The number grows with the commits, so the earlier of two equal ones stays.
    for each in sorted(submissions, key=lambda submission: int(submission.name.rpartition("/")[2])):
        if each.state == evaluation_pb2.SUBMISSION_STATE_SCORED and (
            each.participant not in best or each.score.correct > best[each.participant].score.correct
        ):
            best[each.participant] = each
    ranked = sorted(best.values(), key=lambda each: (-each.score.correct, each.commit_time.ToNanoseconds()))
    expected = [(each.participant, each.name, each.score.correct, each.score.total) for each in ranked]
    shown = [(each.participant, each.submission, each.correct, each.total) for each in board.entries]
    _demand(shown == expected, f"the leaderboard shows {shown}, the scores give {expected}")
    return len(shown)
