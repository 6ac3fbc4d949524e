"""Receipts of draws: what an outsider needs to check them, under the selector's BLS signature."""

from services.runtime import names
from services.runtime.groups import GroupThread, Outcome
from services.selector.convert.pool import CURVE_NUMBERS
from services.selector.convert.times import timestamp
from services.selector.records import Draw, DrawnPlace, PassedOverReason
from tiltyard.bls import BlsKey
from tiltyard.receipts import sign_receipts
from tiltyard.sumtree import SUM_BYTES
from tiltyard.type.v1 import draw_pb2 as types

_REASONS = {reason: types.PassedOverReason.Value(f"PASSED_OVER_REASON_{reason.name}") for reason in PassedOverReason}


class ReceiptSigner:
    """The selector's BLS key at work: sigma for a draw's seed, and the signature over its receipt.

    Both go on in threads outside of the interpreter's lock. Receipts that wait are signed together, and no signature is
    kept: what is signed can be signed again.
    """

    def __init__(self, key: BlsKey) -> None:
        self._key = key
        self._anchors = GroupThread(self._sign_anchors, name="anchor-signer")
        self._receipts = GroupThread(self._sign_receipts, name="receipt-signer")

    async def sign_anchor(self, anchor: bytes) -> bytes:
        """Sigma."""
        return await self._anchors.ask(anchor)

    async def receipt(self, draw: Draw) -> types.DrawReceipt:
        """The signed receipt of a draw as recorded."""
        return await self._receipts.ask(unsigned_receipt(draw))

    async def close(self) -> None:
        """Signs what waits, and ends the threads."""
        await self._anchors.close()
        await self._receipts.close()

    def _sign_anchors(self, anchors: list[bytes]) -> list[Outcome[bytes]]:
        return [(self._key.sign(anchor), None) for anchor in anchors]

    def _sign_receipts(self, receipts: list[types.DrawReceipt]) -> list[Outcome[types.DrawReceipt]]:
        sign_receipts(receipts, self._key.sign)
        return [(receipt, None) for receipt in receipts]


def unsigned_receipt(draw: Draw) -> types.DrawReceipt:
    """The receipt of a draw as recorded, but for the signature."""
    return types.DrawReceipt(
        draw=names.format_draw(draw.draw),
        task=names.format_task(draw.task),
        submission=draw.submission,
        round=draw.round,
        anchor=draw.anchor,
        sigma=draw.sigma,
        reveal_salt=draw.reveal_salt,
        seed=draw.seed,
        pool_root=draw.pool_root,
        pool_weight=_sum(draw.pool_weight),
        pool_size=draw.pool_size,
        curve=CURVE_NUMBERS[draw.curve.kind],
        alpha_millis=draw.curve.alpha_millis,
        assigned=draw.assigned,
        picks=[_pick(position, drawn) for position, drawn in enumerate(draw.picks)],
        passed_over=[_passed_over(drawn, drawn.passed_over) for drawn in draw.places if drawn.passed_over],
        draw_time=timestamp(draw.draw_time),
    )


def _pick(position: int, drawn: DrawnPlace) -> types.Pick:
    return types.Pick(
        position=position,
        participant=names.format_participant(drawn.participant),
        owner_group=drawn.owner_group,
        group_weight=_sum(drawn.place.weight),
        value=_sum(drawn.place.value),
        leaf_index=drawn.place.leaf_index,
        path=drawn.path,
        members=[names.format_participant(member) for member in drawn.members],
        place=drawn.place.place,
    )


def _passed_over(drawn: DrawnPlace, reason: PassedOverReason) -> types.PassedOver:
    return types.PassedOver(
        owner_group=drawn.owner_group,
        reason=_REASONS[reason],
        leaf_index=drawn.place.leaf_index,
        place=drawn.place.place,
        group_weight=_sum(drawn.place.weight),
        value=_sum(drawn.place.value),
        path=drawn.path,
    )


def _sum(value: int) -> bytes:
    return value.to_bytes(SUM_BYTES, "big")
