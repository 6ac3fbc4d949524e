"""What the domain asks of its store: one transaction in which states change and leaves are appended together.

A `put` inserts or replaces by key. Every read inside a transaction sees the puts before it. Works run one after the
other (the store has one writer), so a work that has read something may rely on it until it returns.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

from services.registry.entries import Entry, Genesis
from services.registry.listing import Listing, Place
from services.registry.records import (
    Artifact,
    ArtifactUse,
    Assignment,
    Endorsement,
    Evaluation,
    Member,
    Participant,
    Round,
    Submission,
    Task,
    ValidatorFault,
    Verdict,
)
from services.registry.states import AssignmentState, MembershipState, RoundState, SubmissionState, TaskState

T = TypeVar("T")


@dataclass(frozen=True)
class Leaf:
    """One entry as it was appended. `hash` is the RFC 9162 leaf hash, 32 bytes."""

    index: int
    hash: bytes
    entry: bytes


class Reading(Protocol):
    """Questions; all lists are in the stated order, or that of a `listing`, and at most `limit` long."""

    def participant(self, participant: str) -> Participant | None: ...
    def participants(self, listing: Listing) -> Sequence[tuple[Place, Participant]]: ...

    def endorsement(self, endorser: str, subject: str, field: str) -> Endorsement | None: ...
    def endorsements(
        self, subject: str, *, by: Collection[str] | None = None, limit: int | None = None
    ) -> Sequence[Endorsement]:
        """Those of somebody, by endorser and field; with `by` from these endorsers alone."""
        ...

    def task(self, task: str) -> Task | None: ...
    def tasks(self, listing: Listing) -> Sequence[tuple[Place, Task]]: ...

    def tasks_in(self, state: TaskState) -> Sequence[Task]:
        """All tasks in one state; for the background loop."""
        ...

    def tasks_due(self, now: datetime) -> Sequence[Task]:
        """Those whose state changes by itself at a time that has come."""
        ...

    def active_validators(self, task: str) -> int:
        """How many there are; 0 for an unknown task."""
        ...

    def tasks_ended_with_pool(self) -> Sequence[Task]:
        """FINAL and CANCELLED ones whose pool is still to be closed; for the background loop."""
        ...

    def member(self, task: str, participant: str) -> Member | None: ...
    def members(self, task: str, listing: Listing) -> Sequence[tuple[Place, Member]]: ...
    def members_in(self, state: MembershipState, *, removed: bool) -> Sequence[Member]:
        """Members of all tasks in one state, in order of joining; for the background loop."""
        ...

    def verdicts(self, task: str, *, after: int, limit: int) -> Sequence[tuple[int, Verdict]]: ...

    def submission(self, task: str, number: int) -> Submission | None: ...
    def submissions(
        self,
        task: str,
        *,
        limit: int | None = None,
        state: SubmissionState | None = None,
        participant: str | None = None,
    ) -> Sequence[Submission]:
        """By number."""
        ...

    def submissions_listed(self, task: str, listing: Listing) -> Sequence[tuple[Place, Submission]]: ...

    def submissions_in(self, *states: SubmissionState) -> Sequence[Submission]:
        """All submissions of all tasks in one of the states, by commit time; for the background loop."""
        ...

    def submissions_with_digest(self, task: str, model_digest: bytes) -> Sequence[Submission]:
        """Revealed submissions of the same model in one task, by number (the order of their commits)."""
        ...

    def count_submissions(self, task: str, participant: str, *, since: datetime) -> int:
        """Those committed since, without the ones rejected through the platform's fault
        (VALIDATORS_UNAVAILABLE, TASK_CANCELLED)."""
        ...

    def oldest_submission_since(self, task: str, participant: str, *, since: datetime) -> datetime | None:
        """Commit time of the oldest that `count_submissions` counts."""
        ...

    def track_record(self, participant: str, *, outside_owner_group_of: str) -> Sequence[str]:
        """Resource names of SCORED submissions and AGREED evaluations in tasks whose creator is neither
        `outside_owner_group_of` nor bound to the same owner; at most 10, newest first."""
        ...

    def submissions_due(self, state: SubmissionState, now: datetime) -> Sequence[Submission]:
        """Those in one state whose deadline has come, by deadline; for the background loop."""
        ...

    def submissions_unchecked(self) -> Sequence[Submission]:
        """REVEALED ones whose structure is still to be checked, by commit time; for the background loop."""
        ...

    def public_best(self, task: str, participant: str) -> int | None:
        """The most steps that any submission of a node has been shown with; None for none."""
        ...

    def submissions_hidden(self, task: str, *, limit: int) -> Sequence[Submission]:
        """Those with something that is still to be laid open, by number."""
        ...

    def submissions_without_round(self, task: str, round_: int) -> Sequence[Submission]:
        """SCORED ones that have no such round, by number."""
        ...

    def round(self, task: str, number: int, round_: int) -> Round | None: ...
    def rounds_unconcluded(self) -> Sequence[Round]:
        """All rounds of all tasks that are not CONCLUDED, by deadline."""
        ...

    def rounds_touched(self, state: RoundState, *, after: int) -> Sequence[Round]:
        """Rounds in one state that have changed, or had an assignment or evaluation changed, above a sequence."""
        ...

    def rounds_due(self, state: RoundState, now: datetime) -> Sequence[Round]:
        """Rounds in one state whose deadline has come, by deadline."""
        ...

    def rounds_unconcluded_in(self, task: str, round_: int) -> bool:
        """Whether any such round of a task is not CONCLUDED."""
        ...

    def has_draws(self, task: str) -> bool:
        """Whether any submission of a task has been drawn for."""
        ...

    def rounds_unsure(self, *, limit: int) -> Sequence[Round]:
        """CONCLUDED ones for which the selector may have drawn somebody unheard of."""
        ...

    def has_unsure_rounds(self, task: str) -> bool:
        """Whether a task has any of these."""
        ...

    def assignment(self, task: str, number: int, round_: int, validator: str) -> Assignment | None: ...
    def assignments(self, task: str, number: int, round_: int | None = None) -> Sequence[Assignment]:
        """By round and position."""
        ...

    def validators_of(self, task: str, number: int) -> Sequence[str]:
        """All who were assigned a submission so far, each once, in order of their first round and position."""
        ...

    def assignments_of(self, validator: str, *, after: int, limit: int) -> Sequence[Assignment]:
        """Those whose sequence is above `after`, by sequence."""
        ...

    def assignment_sequence(self) -> int:
        """The sequence of the last assignment that was put, 0 for none."""
        ...

    def assignments_unended_of(self, validator: str) -> Sequence[Assignment]:
        """OFFERED, ACCEPTED and SEALED ones, by sequence."""
        ...

    def assignments_due(self, now: datetime) -> Sequence[Assignment]:
        """OFFERED and ACCEPTED ones whose deadline has passed."""
        ...

    def assignments_running(self, since: datetime) -> Sequence[Assignment]:
        """All with a deadline after `since`, by sequence."""
        ...

    def assignments_unsettled(self, *, task: str | None = None, limit: int | None = None) -> Sequence[Assignment]:
        """Ended ones (OPENED, DECLINED, EXPIRED, RELEASED) that are not settled, by sequence."""
        ...

    def assignment_states(self, task: str, number: int, round_: int) -> Sequence[AssignmentState]:
        """Of the assignments of a round."""
        ...

    def evaluation(self, task: str, number: int, round_: int, validator: str) -> Evaluation | None: ...
    def evaluations(self, task: str, number: int, round_: int | None = None) -> Sequence[Evaluation]:
        """By round and validator."""
        ...

    def prediction_hashes(self, root: str, blocks: int) -> bytes:
        """What was handed in under a prediction root (hex) over so many blocks; empty where nothing was."""
        ...

    def validator_faults(
        self, listing: Listing, *, task: str | None = None, validator: str | None = None
    ) -> Sequence[tuple[Place, ValidatorFault]]:
        """In one task, or of one validator."""
        ...

    def faults_unslashed(self, *, limit: int) -> Sequence[tuple[int, ValidatorFault]]:
        """Those that cost stake and are still to be taken to the selector, oldest first, each with its position."""
        ...

    def draw_receipt(self, draw: str) -> bytes | None: ...

    def artifact(self, sha256: str) -> Artifact | None: ...
    def artifact_uses(self, sha256: str) -> Sequence[ArtifactUse]: ...
    def artifacts_of(self, owner: str) -> Sequence[tuple[ArtifactUse, int]]:
        """All uses of one owner, each with the artifact's size in bytes."""
        ...

    def artifacts_with(self, prefix: str) -> Sequence[str]:
        """Digests in hex of all artifacts that begin with these two digits."""
        ...

    def ledger_position(self) -> int:
        """Sequence number of the last ledger event in the record log, 0 for none."""
        ...

    def ledger_digest(self) -> bytes | None:
        """SHA-256 of that event's bytes; None where there is none, or it was taken before this was kept."""
        ...

    def alive_time(self) -> datetime | None:
        """When the registry was last known to be at work; None before the first time."""
        ...

    def genesis(self) -> Genesis | None:
        """Leaf 0; None for a log that has not begun."""
        ...

    def log_size(self) -> int: ...
    def leaves(self, *, start: int, limit: int) -> Sequence[Leaf]: ...
    def log_root(self) -> tuple[int, bytes]:
        """Size and RFC 9162 root of the record log."""
        ...

    def log_nodes(self, nodes: Collection[tuple[int, int]]) -> Mapping[tuple[int, int], bytes]:
        """Hashes of complete subtrees, the 2**level leaves from index * 2**level on, by level and index, in one go.

        LookupError where there is none.
        """
        ...

    def next_deadline(self) -> datetime | None:
        """The earliest deadline of any task, submission, round or assignment: when the background loop has work."""
        ...


class Writing(Reading, Protocol):
    """Changes; `now` is the transaction's time (UTC), the same for all that it writes."""

    @property
    def now(self) -> datetime: ...

    def append(self, entry: Entry) -> Leaf:
        """Append one leaf to the record log."""
        ...

    def put_participant(self, participant: Participant) -> None: ...
    def put_endorsement(self, endorsement: Endorsement) -> None: ...
    def delete_endorsement(self, endorser: str, subject: str, field: str) -> bool: ...
    def put_task(self, task: Task) -> Task:
        """Store with the next revision and the present `update_time`; wakes the task's watchers after the commit."""
        ...

    def touch_task(self, task: str) -> None:
        """The next revision for a change that shows in the task or its leaderboard but not in its row."""
        ...

    def put_member(self, member: Member) -> None: ...
    def put_verdict(self, verdict: Verdict) -> None: ...
    def next_submission_number(self, task: str) -> int: ...
    def put_submission(self, submission: Submission) -> None:
        """Also wakes the task's watchers."""
        ...

    def put_round(self, round_: Round) -> None: ...
    def put_assignment(self, assignment: Assignment) -> Assignment:
        """Store with the next sequence; wakes the validator's watchers after the commit."""
        ...

    def put_evaluation(self, evaluation: Evaluation) -> None: ...
    def put_prediction_hashes(self, root: str, blocks: int, hashes: bytes) -> None:
        """Kept once, however often it is handed in."""
        ...

    def put_validator_fault(self, fault: ValidatorFault, *, costs_stake: bool) -> None: ...
    def note_slashed(self, position: int) -> None:
        """The selector knows of the fault at this position."""
        ...

    def set_alive_time(self, time: datetime) -> None: ...
    def put_draw_receipt(self, draw: str, receipt: bytes) -> None: ...
    def put_artifact(self, artifact: Artifact) -> None: ...
    def put_artifact_use(self, use: ArtifactUse) -> None: ...
    def delete_artifact(self, sha256: str) -> None:
        """Forget an artifact with all its uses."""
        ...

    def set_ledger_position(self, sequence: int, digest: bytes) -> None: ...


class Store(Protocol):
    """Runs works against the database."""

    async def write(self, work: Callable[[Writing], T], *, final: bool = True, quick: bool = False) -> T:
        """Run `work` in one durable transaction; what it raises rolls back its changes alone.

        With `final` the result is remembered under the caller's request id, so the last write of a domain call
        returns what the domain call returns. A `quick` work reads and changes a few rows by their keys, and is done
        cheaper: others wait until it returns.
        """
        ...

    async def read(self, work: Callable[[Reading], T]) -> T:
        """Run `work` on one consistent snapshot."""
        ...

    async def finds(self, question: Callable[[Reading], Collection[object]]) -> bool:
        """Whether a list that the background loop asks for holds anything.

        Cheaper than to read it: no more than its first entry is, so `question` must not pick among them.
        """
        ...

    async def look_up(self, work: Callable[[Reading], T]) -> T:
        """As `read`, cheaper, for a work that reads a few rows by their keys: others wait until it returns."""
        ...


class Changes(Protocol):
    """Wakes those who watch; topics are `tasks/{task}` and `validators/{participant}`."""

    async def wait(self, topic: str, timeout_s: float) -> None:
        """Return at the next change of the topic after this call, or when the time is over."""
        ...

    def wake_referee(self) -> None:
        """There may be work for the background loop."""
        ...
