"""Validators' duties, step by step: leases, the faults that end them, and what these cost."""

from collections.abc import Iterator

from tiltyard.audit import memberships
from tiltyard.audit.names import Form, demand_name
from tiltyard.audit.reading import Reading
from tiltyard.audit.story import FIRST_ROUND, HOLDOUT_ROUND, Duty, Story
from tiltyard.audit.wrong import Claim, Wrong, demand
from tiltyard.type.v1 import draw_pb2, evaluation_pb2, log_pb2, stake_pb2

_OFFERED = evaluation_pb2.ASSIGNMENT_STATE_OFFERED
_ACCEPTED = evaluation_pb2.ASSIGNMENT_STATE_ACCEPTED
_SEALED = evaluation_pb2.ASSIGNMENT_STATE_SEALED
_OPENED = evaluation_pb2.ASSIGNMENT_STATE_OPENED
_DECLINED = evaluation_pb2.ASSIGNMENT_STATE_DECLINED
_EXPIRED = evaluation_pb2.ASSIGNMENT_STATE_EXPIRED
_RELEASED = evaluation_pb2.ASSIGNMENT_STATE_RELEASED
_OUTLIER = evaluation_pb2.VALIDATOR_FAULT_KIND_OUTLIER

# What an AssignmentChanged may say after which state; sealing and opening have leaves of their own.
_STEPS: dict[int, tuple[int, ...]] = {
    _OFFERED: (_ACCEPTED, _DECLINED, _EXPIRED, _RELEASED),
    _ACCEPTED: (_DECLINED, _EXPIRED, _RELEASED),
    _SEALED: (_EXPIRED, _RELEASED),
}
_OWED: dict[int, int] = {
    _OFFERED: evaluation_pb2.VALIDATOR_FAULT_KIND_OFFER_EXPIRED,
    _ACCEPTED: evaluation_pb2.VALIDATOR_FAULT_KIND_LEASE_EXPIRED,
    _SEALED: evaluation_pb2.VALIDATOR_FAULT_KIND_SEAL_UNOPENED,
}
_SLASHED_FOR: dict[int, int] = {
    stake_pb2.STAKE_FAULT_SEAL_MISSING: evaluation_pb2.VALIDATOR_FAULT_KIND_LEASE_EXPIRED,
    stake_pb2.STAKE_FAULT_SEAL_NOT_OPENED: evaluation_pb2.VALIDATOR_FAULT_KIND_SEAL_UNOPENED,
    stake_pb2.STAKE_FAULT_REPORT_OUTSIDE_TOLERANCE: _OUTLIER,
}
_LOCKS = (stake_pb2.LEDGER_EVENT_KIND_LOCKED, stake_pb2.LEDGER_EVENT_KIND_UNLOCKED)


def assigned(reading: Reading, index: int, leaf: bytes, entry: log_pb2.AssignmentChanged) -> None:
    """One step of a validator's duty."""
    story, name = reading.story, entry.assignment
    submission, round_, validator = parts(name, "/assignments/")
    duty = story.duties.get(name)
    if duty is None:
        receipt = story.draws.get((submission, round_))
        picks = [] if receipt is None else list(receipt.picks)
        right = 0 <= entry.position < len(picks) and picks[entry.position].participant == validator
        demand(right, Claim.HISTORY, f"{name} is given to somebody who was not drawn for position {entry.position}")
        demand(entry.state in (_OFFERED, _RELEASED), Claim.HISTORY, f"{name} begins with something else than an offer")
        duty = story.duties[name] = Duty(entry.state, entry.position, index)
    else:
        demand(duty.state in _STEPS, Claim.HISTORY, f"{name} had ended, and goes on")
        demand(entry.state in _STEPS[duty.state], Claim.HISTORY, f"{name} makes a step that there is not")
        demand(entry.position == duty.position, Claim.HISTORY, f"{name} moves to another place in the draw's order")
        if entry.state == _ACCEPTED:
            memberships.demand_joined(story, story.submissions[submission].task.name, validator)
        duty.owed = _OWED[duty.state] if entry.state == _EXPIRED else 0
        duty.state, duty.index = entry.state, index
    ended = entry.state not in (_OFFERED, _ACCEPTED)
    demand(entry.HasField("deadline") <= (not ended), Claim.HISTORY, f"{name} has ended, and has a deadline")
    reading.counts[Claim.HISTORY] += 1


def seal(story: Story, name: str, evaluation: str) -> None:
    """A lease ends with a seal."""
    duty = story.duties.get(name)
    leased = duty is not None and duty.state == _ACCEPTED
    demand(leased, Claim.HISTORY, f"{evaluation} is sealed without a lease")
    if duty is not None:
        duty.state = _SEALED


def open_report(story: Story, name: str, evaluation: str) -> None:
    """A sealed duty is done."""
    duty = story.duties.get(name)
    sealed = duty is not None and duty.state == _SEALED
    demand(sealed, Claim.SEALS, f"{evaluation} is opened, and its duty had ended without a report")
    if duty is not None:
        duty.state = _OPENED


def faulted(reading: Reading, index: int, leaf: bytes, entry: log_pb2.ValidatorFault) -> None:
    """A validator did not do its duty, or did it wrongly."""
    story, name = reading.story, entry.assignment
    submission, round_, _ = parts(name, "/assignments/")
    duty = story.duties.get(name)
    demand(duty is not None, Claim.HISTORY, f"{name} was never given to anybody")
    if entry.kind == _OUTLIER:
        story.outliers[submission, round_].add(name.replace("/assignments/", "/evaluations/"))
    elif duty is not None:
        demand(entry.kind == duty.owed, Claim.HISTORY, f"{name} is named at fault for what did not happen")
        duty.owed = 0
    demand((name, entry.kind) not in story.faults, Claim.HISTORY, f"{name} is named at fault twice")
    story.faults.add((name, entry.kind))
    reading.counts[Claim.HISTORY] += 1


def unnamed_faults(story: Story) -> Iterator[tuple[int, str]]:
    """Duties that expired and whose fault is in no leaf: the leaf of the expiry, and what is wrong with it."""
    for name, duty in story.duties.items():
        if duty.owed:
            yield duty.index, f"{name} has expired, and no fault was named for it"


def check_ledger_event(story: Story, event: stake_pb2.LedgerEvent) -> None:
    """Whether what is slashed or given back has its reason in the leaves before. Raises Wrong."""
    if event.kind == stake_pb2.LEDGER_EVENT_KIND_QUOTA_REFUNDED:
        receipt = next((each for each in story.draws.values() if each.draw == event.draw), None)
        demand(receipt is not None, Claim.LEDGER, f"{event.draw} is refunded, and was never drawn")
        if receipt is None:
            return
        released = release_of(story, receipt, event.participant) is not None
        demand(released, Claim.LEDGER, f"{event.participant} is refunded for {event.draw} without a release")
    elif event.kind == stake_pb2.LEDGER_EVENT_KIND_SLASHED and event.fault in _SLASHED_FOR:
        mine = event.reference.endswith(f"-{event.participant.removeprefix('participants/')}")
        found = mine and (event.reference, _SLASHED_FOR[event.fault]) in story.faults
        demand(found, Claim.LEDGER, f"{event.participant} is slashed for a fault that no leaf names")


def check_event_names(event: stake_pb2.LedgerEvent) -> None:
    """Whether whom and what an event is about can be. Raises Wrong."""
    # Stakes may be there before their holder has registered, so that no leaf has to name it before.
    if event.kind != stake_pb2.LEDGER_EVENT_KIND_POOL_CLOSED:
        demand_name(event.participant, Form.PARTICIPANT, Claim.LEDGER)
    if event.task or event.kind in _LOCKS:
        demand_name(event.task, Form.TASK, Claim.LEDGER)
    if event.draw or event.kind == stake_pb2.LEDGER_EVENT_KIND_QUOTA_CHARGED:
        demand_name(event.draw, Form.DRAW, Claim.LEDGER)
    if event.kind == stake_pb2.LEDGER_EVENT_KIND_OWNER_GROUPS_MERGED:
        demand_name(event.reference, Form.PARTICIPANT, Claim.LEDGER)


def release_of(story: Story, receipt: draw_pb2.DrawReceipt, participant: str) -> int | None:
    """The leaf that released somebody from the duty that a draw brought; None where none did."""
    who = participant.removeprefix("participants/")
    duty = story.duties.get(f"{receipt.submission}/assignments/{receipt.round}-{who}")
    return duty.index if duty is not None and duty.state == _RELEASED else None


def parts(name: str, middle: str) -> tuple[str, int, str]:
    """Submission, round and validator of an assignment's or evaluation's name. Raises Wrong."""
    submission, _, last = name.partition(middle)
    round_, _, validator = last.partition("-")
    # A round is written in one way: under two names one validator would have two votes.
    if round_ not in (str(FIRST_ROUND), str(HOLDOUT_ROUND)) or not validator:
        raise Wrong(Claim.HISTORY, f"{name} is no name")
    return submission, int(round_), f"participants/{validator}"
