"""DrawService."""

from typing import Any

from services.runtime import names
from services.runtime.auth import current_caller
from services.selector.convert import draw as convert
from services.selector.convert.receipts import ReceiptSigner
from services.selector.draws import Draws
from services.selector.odds_estimates import OddsEstimates
from tiltyard.selector.v1 import draw_pb2 as pb
from tiltyard.selector.v1 import draw_pb2_grpc


class DrawServicer(draw_pb2_grpc.DrawServiceServicer):
    """tiltyard.selector.v1.DrawService."""

    def __init__(self, draws: Draws, odds: OddsEstimates, receipts: ReceiptSigner, selector_key: bytes) -> None:
        self._draws = draws
        self._odds = odds
        self._receipts = receipts
        self._selector_key = selector_key

    async def DrawValidators(self, request: pb.DrawValidatorsRequest, context: Any) -> pb.DrawValidatorsResponse:
        """Draws a random order of a task's pool for one submission and round."""
        drawn = await self._draws.draw(convert.draw_order(request))
        return pb.DrawValidatorsResponse(receipt=await self._receipts.receipt(drawn))

    async def ExtendDraw(self, request: pb.ExtendDrawRequest, context: Any) -> pb.ExtendDrawResponse:
        """Takes the next of the same order."""
        draw, picks, paused = convert.extension(request)
        drawn = await self._draws.extend(draw, picks=picks, paused=paused)
        return pb.ExtendDrawResponse(receipt=await self._receipts.receipt(drawn))

    async def GetDraw(self, request: pb.GetDrawRequest, context: Any) -> pb.GetDrawResponse:
        """Reads one draw with its receipt."""
        drawn = await self._draws.get(names.parse_draw(request.name, "name"))
        return pb.GetDrawResponse(receipt=await self._receipts.receipt(drawn))

    async def SettleAssignment(self, request: pb.SettleAssignmentRequest, context: Any) -> pb.SettleAssignmentResponse:
        """Lets the charge of one pick stand, or gives it back."""
        draw, participant, settlement = convert.settlement(request)
        used = await self._draws.settle(draw, participant=participant, settlement=settlement)
        return pb.SettleAssignmentResponse(used=used)

    async def EstimateOdds(self, request: pb.EstimateOddsRequest, context: Any) -> pb.EstimateOddsResponse:
        """Tells a participant its weight, its chance and its quota."""
        task, participant, validators = convert.odds_question(request, current_caller().id)
        estimate = await self._odds.estimate(task, participant=participant, validators=validators)
        return convert.estimate_odds_response(estimate)

    async def GetSelectorKey(self, request: pb.GetSelectorKeyRequest, context: Any) -> pb.GetSelectorKeyResponse:
        """Reads the key that checks every draw."""
        return pb.GetSelectorKeyResponse(public_key=self._selector_key)
