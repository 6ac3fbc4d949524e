"""Names of nothing, and of somebody else, that the keeper of the log by hand writes where no statement says them."""

from collections.abc import Callable, Sequence

from tests.support.registry_world import key_of
from tests.support.told_lies import Entry, event, first, setting
from tests.support.told_log import ORIGIN, SUBMISSION, ToldLog
from tiltyard.receipts import sign_receipts
from tiltyard.sortition import drawn_member
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2, log_pb2, participation_pb2

_NODE = key_of("node 0")
_STRANGER = f"participants/{key_of('somebody').id}"


def _another_operator(entry: Entry) -> None:
    entry.genesis.operators.append("participants/x")


def _another_member(entry: Entry) -> None:
    """A stranger in an owner group, as the selector itself would draw and sign it."""
    receipt, pick = entry.draw, entry.draw.picks[0]
    members = sorted([*pick.members, _STRANGER])
    del pick.members[:]
    pick.members.extend(members)
    pick.participant = drawn_member(receipt.seed, pick.place, members)
    sign_receipts([receipt], ToldLog().selector.sign)


NAMELESS: dict[str, tuple[Callable[[Entry], bool], Callable[[Entry], None]]] = {
    "an operator": (first("genesis"), _another_operator),
    "the task of a verdict": (first("verdict"), setting("verdict.task", "tasks/T")),
    "a base model": (first("task_created"), setting("task_created.config.base_model", "artifacts/zz")),
    "a depositor": (event("DEPOSITED"), setting("ledger_event.participant", f"participants/{'Z' * 40}")),
    "a lock": (event("LOCKED"), setting("ledger_event.task", "")),
    "a charge": (event("QUOTA_CHARGED"), setting("ledger_event.draw", "")),
    "an original": (first("submission_changed"), setting("submission_changed.original", SUBMISSION)),
    "a member of an owner group": (first("draw"), _another_member),
}
"""Which leaf, and what is written there otherwise."""


def strangers(entries: Sequence[Entry]) -> dict[str, Entry]:
    """Further leaves, about somebody who has not registered or has not asked for it."""
    verdict, joined = Entry(), Entry()
    verdict.CopyFrom(next(entry for entry in entries if entry.WhichOneof("entry") == "verdict"))
    verdict.verdict.evidence[0].references.append(_STRANGER)
    joined.CopyFrom(next(entry for entry in entries if entry.WhichOneof("entry") == "membership_changed"))
    joined.membership_changed.participant = _STRANGER
    joined.membership_changed.state = participation_pb2.MEMBERSHIP_STATE_REFUSED
    word = envelope_pb2.EndorsementStatement(
        origin=ORIGIN, endorser=f"participants/{_NODE.id}", subject=_STRANGER, field="digits"
    )
    endorsed = Entry(endorsement_changed=log_pb2.EndorsementChanged(statement=sign_statement(_NODE, word)))
    return {"a stake with a reference": verdict, "a join by another's word": joined, "a word for nobody": endorsed}
