"""A log read leaf by leaf, each held against what the leaves before it say."""

from collections.abc import Callable, Iterator, Mapping

from tiltyard.audit import arena, duties, judging, memberships, tasks
from tiltyard.audit.ledger import Ledger
from tiltyard.audit.reading import Reading
from tiltyard.audit.story import Task
from tiltyard.audit.wrong import Claim, Wrong, demand, moment_ns
from tiltyard.type.v1 import draw_pb2, log_pb2, stake_pb2, task_pb2

_STEPS: Mapping[str, Callable[..., None]] = {
    "genesis": arena.began,
    "participant_registered": arena.participant_registered,
    "owner_bound": arena.owner_bound,
    "endorsement_changed": arena.endorsement_changed,
    "outage_ended": arena.outage_ended,
    "verdict": memberships.verdict_given,
    "membership_changed": memberships.membership_changed,
    "task_created": tasks.task_created,
    "task_changed": tasks.task_changed,
    "holdout_changed": tasks.holdout_changed,
    "submission_committed": judging.committed,
    "submission_revealed": judging.revealed,
    "submission_changed": judging.changed,
    "draw": judging.drawn,
    "evaluation_sealed": judging.sealed,
    "evaluation_opened": judging.opened,
    "score_concluded": judging.concluded,
    "assignment_changed": duties.assigned,
    "validator_fault": duties.faulted,
}
"""What the reading learns from each kind of leaf, but for the ledger's events. Each is given its index and its hash."""


class Replay:
    """A log that is read, and the ledger that its events give."""

    def __init__(self) -> None:
        self.reading = Reading()
        self.pending = 0
        """What cannot be said yet, for want of the ledger's later events."""
        self.oldest_pending: int | None = None
        """The first leaf about which something cannot be said yet."""
        story = self.reading.story
        self._ledger = Ledger(lambda name: story.tasks[name].config.selection if name in story.tasks else None)
        self._charged: dict[tuple[str, str], int] = {}
        """The leaf by draw and participant."""

    def take(self, index: int, leaf: bytes, entry: log_pb2.LogEntry) -> None:
        """The next leaf, by its hash. Raises Wrong, or what is wrong with an envelope or a ledger event."""
        kind = entry.WhichOneof("entry")
        known = kind == "ledger_event" or kind in _STEPS
        demand(known, Claim.HISTORY, "the entry is of an unknown kind")
        demand((index == 0) == (kind == "genesis"), Claim.HISTORY, "a log begins with its genesis, and has one")
        self.reading.time_ns = moment_ns(entry.time, Claim.HISTORY, "the leaf")
        if kind == "ledger_event":
            self._ledger_event(index, entry.ledger_event)
        elif kind is not None:
            _STEPS[kind](self.reading, index, leaf, getattr(entry, kind))
            if kind == "task_changed":
                self._check_backed(entry.task_changed)

    def settle(self) -> Iterator[tuple[int, Wrong]]:
        """What can be said only when all leaves, and all of the ledger, are known."""
        for index, reason in judging.cancelled_without_its_task(self.reading.story):
            yield index, Wrong(Claim.HISTORY, reason)
        for index, reason in duties.unnamed_faults(self.reading.story):
            yield index, Wrong(Claim.HISTORY, reason)
        for index, reason in self._charged_without_a_pick():
            yield index, Wrong(Claim.LEDGER, reason)
        for waiting in self.reading.story.verdicts:
            amounts = memberships.stakes_weighed(waiting.verdict)
            if all(self._ledger.had(waiting.verdict.participant, amount) for amount in amounts):
                self.reading.counts[Claim.VERDICTS] += 1
            elif self._ledger.last_time_ns > waiting.decide_time_ns:
                yield (
                    waiting.index,
                    Wrong(Claim.VERDICTS, f"{waiting.verdict.participant} never had a stake of {amounts} available"),
                )
            else:
                self._wait_for(waiting.index)
        for key, receipt in self.reading.story.draws.items():
            pool = self._ledger.drawn.get(receipt.draw)
            index = self.reading.story.draw_leaves[key]
            if pool is None and self._ledger.last_time_ns > receipt.draw_time.ToNanoseconds():
                yield index, Wrong(Claim.POOLS, f"{receipt.draw} was never charged to anybody's quota")
                continue
            # What a FINAL task lacks was told of at the leaf that made it so.
            if self._task_of(receipt).state != task_pb2.TASK_STATE_FINAL:
                missing = [at for at, _ in self._unbacked(receipt)]
                if missing:
                    self._wait_for(min(missing))
            if pool is None:
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
                self.reading.counts[Claim.POOLS] += 1

    def _wait_for(self, index: int) -> None:
        """Something about a leaf cannot be said yet."""
        self.pending += 1
        self.oldest_pending = index if self.oldest_pending is None else min(index, self.oldest_pending)

    def _check_backed(self, entry: log_pb2.TaskChanged) -> None:
        """Whether the ledger holds all that belongs to the draws of a task that is FINAL. Raises Wrong."""
        if entry.state != task_pb2.TASK_STATE_FINAL:
            return
        for receipt in self.reading.story.draws.values():
            if self._task_of(receipt).name == entry.task:
                for _, reason in self._unbacked(receipt):
                    raise Wrong(Claim.LEDGER, f"{entry.task} is final, and {reason}")

    def _unbacked(self, receipt: draw_pb2.DrawReceipt) -> Iterator[tuple[int, str]]:
        """What of a draw the ledger has not told so far: the leaf that it should follow, and what is missing."""
        story = self.reading.story
        for pick in receipt.picks:
            given_back = self._ledger.charges.get((receipt.draw, pick.participant))
            released = duties.release_of(story, receipt, pick.participant)
            if given_back is None:
                yield (
                    story.picked[receipt.draw, pick.participant],
                    f"{pick.participant} is not charged for {receipt.draw}",
                )
            elif released is not None and not given_back:
                yield released, f"{pick.participant} is released and not refunded for {receipt.draw}"

    def _task_of(self, receipt: draw_pb2.DrawReceipt) -> Task:
        return self.reading.story.submissions[receipt.submission].task

    def _charged_without_a_pick(self) -> Iterator[tuple[int, str]]:
        picked = {each.draw: {pick.participant for pick in each.picks} for each in self.reading.story.draws.values()}
        for (draw, who), index in self._charged.items():
            if draw in picked and who not in picked[draw]:
                yield index, f"{who} is charged for {draw}, which has not picked it"

    def _ledger_event(self, index: int, entry: stake_pb2.LedgerEvent) -> None:
        duties.check_ledger_event(self.reading.story, entry)
        self._ledger.take(entry)
        duties.check_event_names(entry)
        if entry.kind == stake_pb2.LEDGER_EVENT_KIND_QUOTA_CHARGED:
            self._charged[entry.draw, entry.participant] = index
        self.reading.counts[Claim.LEDGER] += 1
