"""A log read leaf by leaf, each held against what the leaves before it say."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from google.protobuf.message import Message

from tiltyard.audit import duties, judging, memberships
from tiltyard.audit.ledger import Ledger
from tiltyard.audit.story import Story, Task
from tiltyard.audit.wrong import Claim, Wrong, demand
from tiltyard.identity import participant_id
from tiltyard.statements import open_statement
from tiltyard.type.v1 import envelope_pb2, log_pb2, participation_pb2, stake_pb2, task_pb2

M = TypeVar("M", bound=Message)

_TASK_STEPS = {
    task_pb2.TASK_STATE_PREPARING: (task_pb2.TASK_STATE_OPEN, task_pb2.TASK_STATE_CANCELLED),
    task_pb2.TASK_STATE_OPEN: (task_pb2.TASK_STATE_CLOSED, task_pb2.TASK_STATE_CANCELLED),
    task_pb2.TASK_STATE_CLOSED: (task_pb2.TASK_STATE_FINAL, task_pb2.TASK_STATE_CANCELLED),
}


class Replay:
    """The state that the leaves give. `counts` says how often each claim was checked."""

    def __init__(self) -> None:
        self.story = Story()
        self.counts: dict[Claim, int] = defaultdict(int)
        self.pending = 0
        self.time_ns = 0
        """When the leaf that is looked at was written."""
        self._ledger = Ledger(
            lambda name: self.story.tasks[name].config.selection if name in self.story.tasks else None
        )
        self._charged: dict[tuple[str, str], int] = {}
        """The leaf by draw and participant."""

    def take(self, index: int, leaf: bytes, entry: log_pb2.LogEntry) -> None:
        """The next leaf, by its hash. Raises Wrong, or what is wrong with an envelope or a ledger event."""
        kind = entry.WhichOneof("entry")
        self.time_ns = entry.time.ToNanoseconds()
        step = _STEPS.get(kind or "")
        demand(step is not None, Claim.HISTORY, "the entry is of an unknown kind")
        demand((index == 0) == (kind == "genesis"), Claim.HISTORY, "a log begins with its genesis, and has one")
        if step is not None and kind is not None:
            step(self, index, leaf, getattr(entry, kind))

    def settle(self) -> Iterator[tuple[int, Wrong]]:
        """What can be said only when all leaves, and all of the ledger, are known."""
        for index, reason in judging.cancelled_without_its_task(self.story):
            yield index, Wrong(Claim.HISTORY, reason)
        for index, reason in duties.unnamed_faults(self.story):
            yield index, Wrong(Claim.HISTORY, reason)
        for index, reason in self._charged_without_a_pick():
            yield index, Wrong(Claim.LEDGER, reason)
        for waiting in self.story.verdicts:
            amounts = memberships.stakes_weighed(waiting.verdict)
            if all(self._ledger.had(waiting.verdict.participant, amount) for amount in amounts):
                self.counts[Claim.VERDICTS] += 1
            elif self._ledger.last_time_ns > waiting.verdict.decide_time.ToNanoseconds():
                yield (
                    waiting.index,
                    Wrong(Claim.VERDICTS, f"{waiting.verdict.participant} never had a stake of {amounts} available"),
                )
            else:
                self.pending += 1
        for key, receipt in self.story.draws.items():
            pool = self._ledger.drawn.get(receipt.draw)
            index = self.story.draw_leaves[key]
            if pool is None:
                if self._ledger.last_time_ns > receipt.draw_time.ToNanoseconds():
                    yield index, Wrong(Claim.POOLS, f"{receipt.draw} was never charged to anybody's quota")
                else:
                    self.pending += 1
                continue
            named = (receipt.pool_root, int.from_bytes(receipt.pool_weight, "big"), receipt.pool_size)
            if named != (pool.root, pool.weight, pool.size):
                yield (
                    index,
                    Wrong(
                        Claim.POOLS,
                        f"{receipt.draw} was drawn from a pool of root {receipt.pool_root.hex()}, "
                        f"the ledger gives {pool.root.hex()} with {pool.size} owner groups",
                    ),
                )
            else:
                self.counts[Claim.POOLS] += 1

    def _charged_without_a_pick(self) -> Iterator[tuple[int, str]]:
        picked = {each.draw: {pick.participant for pick in each.picks} for each in self.story.draws.values()}
        for (draw, who), index in self._charged.items():
            if draw in picked and who not in picked[draw]:
                yield index, f"{who} is charged for {draw}, which has not picked it"

    def open(self, envelope: envelope_pb2.Envelope, expected: type[M], *, by_participant: bool = True) -> tuple[M, str]:
        """The statement in an envelope and its signer as participants/{id}, who has registered; counted."""
        statement, signer = open_statement(envelope, expected)
        origin = getattr(statement, "origin")  # noqa: B009 - every statement has one, which Message does not know
        demand(origin == self.story.origin, Claim.ENVELOPES, f"the statement is of another arena: {origin}")
        demand(
            not by_participant or f"participants/{signer}" in self.story.participants,
            Claim.ENVELOPES,
            f"the statement is signed by {signer}, who has not registered",
        )
        self.counts[Claim.ENVELOPES] += 1
        return statement, f"participants/{signer}"

    def task(self, name: str) -> Task:
        """A task that was created before."""
        demand(name in self.story.tasks, Claim.HISTORY, f"{name} was never created")
        return self.story.tasks[name]

    def _genesis(self, index: int, leaf: bytes, genesis: log_pb2.Genesis) -> None:
        self.story.origin, self.story.selector_key = genesis.origin, genesis.selector_key

    def _participant_registered(self, index: int, leaf: bytes, entry: log_pb2.ParticipantRegistered) -> None:
        named = f"participants/{participant_id(entry.public_key)}"
        demand(named == entry.participant, Claim.HISTORY, f"{entry.participant} is not the id of its key")
        self.story.participants[entry.participant] = entry.display_name

    def _owner_bound(self, index: int, leaf: bytes, entry: log_pb2.OwnerBound) -> None:
        # An owner vouches with a key of its own, and takes part in nothing.
        said, signer = self.open(entry.statement, envelope_pb2.OwnerStatement, by_participant=False)
        known = said.participant in self.story.participants
        demand(known, Claim.HISTORY, f"{said.participant} is owned, and has not registered")
        demand(said.owner == signer, Claim.ENVELOPES, f"{said.owner} did not sign, {signer} did")
        self.story.owners[said.participant] = said.owner

    def _endorsement_changed(self, index: int, leaf: bytes, entry: log_pb2.EndorsementChanged) -> None:
        said, signer = self.open(entry.statement, envelope_pb2.EndorsementStatement)
        demand(said.endorser == signer, Claim.ENVELOPES, f"{said.endorser} did not sign, {signer} did")
        if not said.revoke:
            self.story.endorsements.add((said.endorser, said.subject, said.field))

    def _task_created(self, index: int, leaf: bytes, entry: log_pb2.TaskCreated) -> None:
        demand(entry.task not in self.story.tasks, Claim.HISTORY, f"{entry.task} is created twice")
        memberships.demand_eligible(self.story, entry.task, entry.creator, memberships.CREATOR)
        memberships.check_field(self.story, entry.task, entry.creator, entry.config.field)
        self.story.tasks[entry.task] = Task(entry.task, entry.creator, entry.config)

    def _task_changed(self, index: int, leaf: bytes, entry: log_pb2.TaskChanged) -> None:
        task = self.task(entry.task)
        if entry.HasField("config"):
            demand(entry.state == task.state, Claim.HISTORY, f"{entry.task} is amended and changes its state at once")
            _check_amendment(task, entry.config)
            task.config = entry.config
            return
        allowed = _TASK_STEPS.get(task.state, ())
        demand(entry.state in allowed, Claim.HISTORY, f"{entry.task} makes a step that there is not")
        if entry.state == task_pb2.TASK_STATE_FINAL:
            task.ranking_round = judging.ranking_round(self.story, task)
            expected = f"round {task.ranking_round} ranks"
            demand(
                entry.reason == expected, Claim.SCORES, f"{entry.task} is final by {entry.reason!r}, not {expected!r}"
            )
        task.state = entry.state
        self.counts[Claim.HISTORY] += 1

    def _holdout_changed(self, index: int, leaf: bytes, entry: log_pb2.HoldoutChanged) -> None:
        task = self.task(entry.task)
        demand(task.config.HasField("holdout"), Claim.HISTORY, f"{entry.task} has no holdout")
        demand(not task.holdout_told, Claim.HISTORY, f"the holdout of {entry.task} has two fates")
        closed = task.state == task_pb2.TASK_STATE_CLOSED
        demand(closed, Claim.HISTORY, f"the holdout of {entry.task} is told of, and the task is not closed")
        demand(entry.accepted != bool(entry.reason), Claim.HISTORY, f"the holdout of {entry.task} has no clear fate")
        task.holdout_told = True
        if entry.accepted:
            task.holdout_leaf = leaf

    def _verdict(self, index: int, leaf: bytes, entry: participation_pb2.EligibilityVerdict) -> None:
        memberships.take_verdict(self.story, index, entry)

    def _membership_changed(self, index: int, leaf: bytes, entry: log_pb2.MembershipChanged) -> None:
        self.task(entry.task)
        if entry.HasField("statement"):
            said, signer = self.open(entry.statement, envelope_pb2.JoinStatement)
            demand(
                (said.task, said.participant, said.role) == (entry.task, signer, entry.role),
                Claim.ENVELOPES,
                f"{signer} asked for another task or role",
            )
        memberships.take_membership(self.story, entry)
        self.counts[Claim.HISTORY] += 1

    def _ledger_event(self, index: int, leaf: bytes, entry: stake_pb2.LedgerEvent) -> None:
        duties.check_ledger_event(self.story, entry)
        self._ledger.take(entry)
        if entry.kind == stake_pb2.LEDGER_EVENT_KIND_QUOTA_CHARGED:
            self._charged[entry.draw, entry.participant] = index
        self.counts[Claim.LEDGER] += 1

    def _outage_ended(self, index: int, leaf: bytes, entry: log_pb2.OutageEnded) -> None:
        back_ns = entry.back.ToNanoseconds()
        right = back_ns == self.time_ns and entry.last_alive.ToNanoseconds() < back_ns
        demand(right, Claim.HISTORY, "an outage ends at another time than it is told, or before it began")


def _check_amendment(task: Task, config: task_pb2.TaskConfig) -> None:
    before, after = task_pb2.TaskConfig(), task_pb2.TaskConfig()
    before.CopyFrom(task.config)
    after.CopyFrom(config)
    later = after.schedule.close_time.ToNanoseconds() >= before.schedule.close_time.ToNanoseconds()
    for each in (before, after):
        for name in ("display_name", "description"):
            each.ClearField(name)
        each.schedule.ClearField("close_time")
    demand(before == after and later, Claim.HISTORY, f"{task.name} is amended in what does not change")


_STEPS: Mapping[str, Callable[..., None]] = {
    "genesis": Replay._genesis,
    "participant_registered": Replay._participant_registered,
    "owner_bound": Replay._owner_bound,
    "endorsement_changed": Replay._endorsement_changed,
    "verdict": Replay._verdict,
    "task_created": Replay._task_created,
    "task_changed": Replay._task_changed,
    "membership_changed": Replay._membership_changed,
    "submission_committed": judging.committed,
    "submission_revealed": judging.revealed,
    "submission_changed": judging.changed,
    "draw": judging.drawn,
    "assignment_changed": duties.assigned,
    "evaluation_sealed": judging.sealed,
    "evaluation_opened": judging.opened,
    "score_concluded": judging.concluded,
    "ledger_event": Replay._ledger_event,
    "holdout_changed": Replay._holdout_changed,
    "validator_fault": duties.faulted,
    "outage_ended": Replay._outage_ended,
}
