"""Lies about the arena that is told: what the log's keeper writes otherwise, and signs."""

from collections.abc import Callable
from typing import Any

from tests.support.registry_world import NODES, VALIDATORS
from tiltyard.audit import Claim
from tiltyard.type.v1 import evaluation_pb2, log_pb2, stake_pb2, task_pb2

Entry = log_pb2.LogEntry


def score_of(task: str, number: int, *, round_: int = 1) -> Callable[[Entry], bool]:
    """The leaf that tells a score."""
    return lambda entry: (
        entry.score_concluded.submission == f"tasks/{task}/submissions/{number}"
        and entry.score_concluded.score.round == round_
    )


def change_of(task: str, number: int, state: str) -> Callable[[Entry], bool]:
    """The leaf that ends, or goes on with, a submission."""
    value = evaluation_pb2.SubmissionState.Value(f"SUBMISSION_STATE_{state}")
    return lambda entry: (
        entry.submission_changed.submission == f"tasks/{task}/submissions/{number}"
        and entry.submission_changed.state == value
    )


def task_is(task: str, state: str) -> Callable[[Entry], bool]:
    """The leaf of a task's step."""
    value = task_pb2.TaskState.Value(f"TASK_STATE_{state}")
    return lambda entry: entry.task_changed.task == f"tasks/{task}" and entry.task_changed.state == value


def amendment_of(task: str) -> Callable[[Entry], bool]:
    """The leaf of an amendment."""
    return lambda entry: entry.task_changed.task == f"tasks/{task}" and entry.task_changed.HasField("config")


def opening_in(task: str) -> Callable[[Entry], bool]:
    """The first leaf that lays a report of a task open."""
    return lambda entry: entry.evaluation_opened.evaluation.startswith(f"tasks/{task}/")


def draw_in(task: str, round_: int) -> Callable[[Entry], bool]:
    """The first draw of a task's round."""
    return lambda entry: entry.draw.task == f"tasks/{task}" and entry.draw.round == round_


def more_correct(entry: Entry) -> None:
    entry.score_concluded.score.correct += 1


def salt(entry: Entry) -> None:
    entry.evaluation_opened.salt = bytes(32)


def unsalted(entry: Entry) -> None:
    entry.score_concluded.salt = bytes(32)


def of_another_original(entry: Entry) -> None:
    entry.submission_changed.original = "tasks/dispute/submissions/1"


def no_outlier(entry: Entry) -> None:
    del entry.score_concluded.score.outliers[:]


def for_reason(name: str) -> Callable[[Entry], None]:
    def change(entry: Entry) -> None:
        entry.submission_changed.reason = evaluation_pb2.RejectionReason.Value(f"REJECTION_REASON_{name}")

    return change


def rejected(entry: Entry) -> None:
    entry.submission_changed.state = evaluation_pb2.SUBMISSION_STATE_REJECTED
    for_reason("TASK_CANCELLED")(entry)


def by_round(number: int) -> Callable[[Entry], None]:
    def change(entry: Entry) -> None:
        entry.task_changed.reason = f"round {number} ranks"

    return change


def made_final(entry: Entry) -> None:
    entry.task_changed.state = task_pb2.TASK_STATE_FINAL


def other_anchor(entry: Entry) -> None:
    entry.draw.anchor = bytes(32)


def another_base(entry: Entry) -> None:
    entry.task_changed.config.base_model = f"artifacts/{'0' * 64}"


def easier(entry: Entry) -> None:
    entry.task_changed.config.bound = 1.0


def first(of: str, **values: Any) -> Callable[[Entry], bool]:
    """The first leaf of a kind with these values."""

    def is_it(entry: Entry) -> bool:
        told = getattr(entry, of)
        return entry.WhichOneof("entry") == of and all(getattr(told, name) == each for name, each in values.items())

    return is_it


def event(kind: str) -> Callable[[Entry], bool]:
    """The first ledger event of a kind."""
    return first("ledger_event", kind=stake_pb2.LedgerEventKind.Value(f"LEDGER_EVENT_KIND_{kind}"))


def setting(path: str, value: Any) -> Callable[[Entry], None]:
    """One field gets another value."""

    def change(entry: Entry) -> None:
        *way, last = path.split(".")
        told: Any = entry
        for name in way:
            told = getattr(told, name)
        setattr(told, last, value)

    return change


def unsigned(kind: str, statement: str = "statement") -> Callable[[Entry], None]:
    """An envelope that nobody signed."""
    return setting(f"{kind}.{statement}.signature", bytes(64))


def uninvited(entry: Entry) -> None:
    entry.membership_changed.ClearField("statement")


def later(entry: Entry) -> None:
    entry.outage_ended.back.seconds += 1


def dearer(entry: Entry) -> None:
    entry.ledger_event.amount_micros += 1


ACCEPTED = evaluation_pb2.ASSIGNMENT_STATE_ACCEPTED
LEASE_EXPIRED = evaluation_pb2.VALIDATOR_FAULT_KIND_LEASE_EXPIRED
SOMEBODY = f"participants/{NODES[0].id}"

LIES: dict[str, tuple[Callable[[Entry], bool], Callable[[Entry], None], Claim]] = {
    "the score of a dispute": (score_of("dispute", 1), more_correct, Claim.SCORES),
    "the outlier of a dispute": (score_of("dispute", 1), no_outlier, Claim.SCORES),
    "the original of a copy": (change_of("dispute", 3, "REJECTED"), of_another_original, Claim.HISTORY),
    "a copy that is none": (change_of("dispute", 4, "REJECTED"), for_reason("COPY"), Claim.HISTORY),
    "another fault": (change_of("dispute", 4, "REJECTED"), for_reason("CRASHED"), Claim.SCORES),
    "a fault of the file after the draw": (change_of("dispute", 4, "REJECTED"), for_reason("BAD_FORMAT"), Claim.SCORES),
    "a majority where there is none": (change_of("dispute", 5, "REJECTED"), for_reason("NAN_OUTPUT"), Claim.SCORES),
    "a reveal that was in time": (change_of("dispute", 6, "REJECTED"), for_reason("REVEAL_EXPIRED"), Claim.HISTORY),
    "a task that was not cancelled": (change_of("top-k", 3, "SCORED"), rejected, Claim.HISTORY),
    "a score that was kept back": (score_of("ladder", 3), more_correct, Claim.SCORES),
    "the salt of a score that was kept back": (score_of("ladder", 2), unsalted, Claim.SCORES),
    "a report that was kept back": (opening_in("ladder"), salt, Claim.SEALS),
    "the score of the holdout": (score_of("holdout", 2, round_=2), more_correct, Claim.SCORES),
    "the round that ranks": (task_is("holdout", "FINAL"), by_round(1), Claim.SCORES),
    "the anchor of a draw for the holdout": (draw_in("holdout", 2), other_anchor, Claim.DRAWS),
    "a holdout that never came": (task_is("unpublished", "FINAL"), by_round(2), Claim.SCORES),
    "a result of a cancelled task": (task_is("cancelled", "CANCELLED"), made_final, Claim.HISTORY),
    "a score of a cancelled task": (score_of("cancelled", 1), more_correct, Claim.SCORES),
    "the score of a regression": (score_of("regression", 1), more_correct, Claim.SCORES),
    "a report of a regression": (opening_in("regression"), salt, Claim.SEALS),
    "a score by the k largest outputs": (score_of("top-k", 2), more_correct, Claim.SCORES),
    "another base model": (amendment_of("base-model"), another_base, Claim.HISTORY),
    "another metric": (amendment_of("base-model"), easier, Claim.HISTORY),
    "who has which key": (
        first("participant_registered"),
        setting("participant_registered.participant", SOMEBODY),
        Claim.HISTORY,
    ),
    "who owns whom": (first("owner_bound"), unsigned("owner_bound"), Claim.ENVELOPES),
    "a word for somebody": (first("endorsement_changed"), unsigned("endorsement_changed"), Claim.ENVELOPES),
    "a verdict": (first("verdict", eligible=True), setting("verdict.eligible", False), Claim.VERDICTS),
    "whose task it is": (first("task_created"), setting("task_created.creator", SOMEBODY), Claim.VERDICTS),
    "a join without a word": (first("membership_changed"), uninvited, Claim.HISTORY),
    "who joined": (
        first("membership_changed"),
        setting("membership_changed.participant", f"participants/{VALIDATORS[0].id}"),
        Claim.ENVELOPES,
    ),
    "another role": (first("membership_changed"), setting("membership_changed.role", 3), Claim.ENVELOPES),
    "a commit": (first("submission_committed"), unsigned("submission_committed"), Claim.ENVELOPES),
    "a reveal": (first("submission_revealed"), unsigned("submission_revealed"), Claim.ENVELOPES),
    "a lease": (first("assignment_changed", state=ACCEPTED), setting("assignment_changed.position", 5), Claim.HISTORY),
    "a seal": (first("evaluation_sealed"), unsigned("evaluation_sealed"), Claim.ENVELOPES),
    "a report": (first("evaluation_opened"), unsigned("evaluation_opened", "report"), Claim.ENVELOPES),
    "a fault": (first("validator_fault"), setting("validator_fault.kind", LEASE_EXPIRED), Claim.HISTORY),
    "the fate of a holdout": (first("holdout_changed"), setting("holdout_changed.accepted", False), Claim.HISTORY),
    "an outage": (first("outage_ended"), later, Claim.HISTORY),
    "who owns a group": (event("OWNER_GROUPS_MERGED"), setting("ledger_event.reference", "it"), Claim.LEDGER),
    "what a fault costs": (event("SLASHED"), dearer, Claim.LEDGER),
    "what somebody is slashed for": (event("SLASHED"), setting("ledger_event.reference", "it"), Claim.LEDGER),
    "a charge": (event("QUOTA_CHARGED"), setting("ledger_event.participant", SOMEBODY), Claim.LEDGER),
    "a refund": (event("QUOTA_REFUNDED"), setting("ledger_event.participant", SOMEBODY), Claim.LEDGER),
    "a weight": (event("CANDIDATE_ADDED"), setting("ledger_event.weight", 7), Claim.LEDGER),
}
"""What is written otherwise: the leaf, how, and the claim that finds it."""
