"""StakeService."""

from typing import Any

from services.runtime import names
from services.runtime.auth import current_caller
from services.runtime.idempotency import idempotent
from services.runtime.paging import PageTokens
from services.selector.convert import stake as convert
from services.selector.records import Stake
from services.selector.stakes import Slashed, Stakes, WithdrawalRequested, Withdrawn
from tiltyard.selector.v1 import stake_pb2 as pb
from tiltyard.selector.v1 import stake_pb2_grpc


class StakeServicer(stake_pb2_grpc.StakeServiceServicer):
    """tiltyard.selector.v1.StakeService."""

    def __init__(self, stakes: Stakes, tokens: PageTokens) -> None:
        self._stakes = stakes
        self._tokens = tokens

    @idempotent(convert.deposit_response)
    async def Deposit(self, request: pb.DepositRequest, context: Any) -> Stake:
        """Adds to a participant's available stake."""
        return await self._stakes.deposit(convert.deposit(request))

    @idempotent(convert.request_withdrawal_response)
    async def RequestWithdrawal(self, request: pb.RequestWithdrawalRequest, context: Any) -> WithdrawalRequested:
        """Moves the caller's available stake to unbonding."""
        amount_micros = convert.withdrawal_amount(request)
        return await self._stakes.request_withdrawal(current_caller().id, amount_micros)

    @idempotent(convert.withdraw_response)
    async def Withdraw(self, request: pb.WithdrawRequest, context: Any) -> Withdrawn:
        """Takes the caller's stake out whose waiting time is over."""
        return await self._stakes.withdraw(current_caller().id)

    @idempotent(convert.slash_response)
    async def Slash(self, request: pb.SlashRequest, context: Any) -> Slashed:
        """Takes stake away for a recorded fault."""
        participant, fault, evidence = convert.slash(request)
        return await self._stakes.slash(participant, fault=fault, evidence=evidence)

    async def GetStake(self, request: pb.GetStakeRequest, context: Any) -> pb.GetStakeResponse:
        """Reads one participant's accounts."""
        stake = await self._stakes.get(names.parse_stake(request.name, "name"))
        return pb.GetStakeResponse(stake=convert.stake_message(stake))

    async def ListStakes(self, request: pb.ListStakesRequest, context: Any) -> pb.ListStakesResponse:
        """Lists all who have or had stake."""
        after, size = convert.stakes_page(request, self._tokens)
        stakes = await self._stakes.list(after=after, limit=size + 1)
        return convert.list_stakes_response(stakes, size, self._tokens)

    async def ListLedgerEvents(self, request: pb.ListLedgerEventsRequest, context: Any) -> pb.ListLedgerEventsResponse:
        """Lists changes in order."""
        start, limit = convert.events_page(request)
        return convert.list_ledger_events_response(await self._stakes.list_events(start=start, limit=limit))
