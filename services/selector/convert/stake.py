"""StakeService's messages."""

from collections.abc import Sequence

from services.runtime import names
from services.runtime.errors import InvalidArgument
from services.runtime.fields import FieldChecks
from services.runtime.paging import PageTokens, page_size
from services.selector.convert.times import duration, timestamp
from services.selector.records import MAX_MICROS, Deposit, EventKind, LedgerEvent, Stake
from services.selector.stakes import LedgerPage, Slashed, WithdrawalRequested, Withdrawn
from tiltyard.faults import Fault
from tiltyard.selector.v1 import stake_pb2 as pb
from tiltyard.type.v1 import stake_pb2 as types

STAKES_QUERY = "ListStakes"
_REFERENCE_CHARS = 200
_EVENTS_PER_PAGE = 100
_UINT64_MAX = 2**64 - 1
_FAULTS = {types.StakeFault.Value(f"STAKE_FAULT_{fault.name}"): fault for fault in Fault}
_FAULT_NUMBERS = {fault: number for number, fault in _FAULTS.items()}


def deposit(request: pb.DepositRequest) -> Deposit:
    """Raises InvalidArgument."""
    participant = names.parse_participant(request.participant, "participant")
    checks = FieldChecks()
    checks.range("amount_micros", request.amount_micros, minimum=1, maximum=MAX_MICROS, unit="micro-units")
    checks.compared_text("reference", request.reference, max_chars=_REFERENCE_CHARS)
    checks.compared_text("funding_account", request.funding_account, max_chars=_REFERENCE_CHARS)
    checks.finish()
    return Deposit(request.reference, participant, request.amount_micros, request.funding_account)


def deposit_response(stake: Stake) -> pb.DepositResponse:
    """The accounts afterwards."""
    return pb.DepositResponse(stake=stake_message(stake))


def withdrawal_amount(request: pb.RequestWithdrawalRequest) -> int:
    """Raises InvalidArgument."""
    return _amount(request.amount_micros)


def request_withdrawal_response(requested: WithdrawalRequested) -> pb.RequestWithdrawalResponse:
    """The accounts afterwards, and the wait."""
    return pb.RequestWithdrawalResponse(stake=stake_message(requested.stake), wait=duration(requested.wait))


def withdraw_response(withdrawn: Withdrawn) -> pb.WithdrawResponse:
    """The accounts afterwards, and what left."""
    return pb.WithdrawResponse(stake=stake_message(withdrawn.stake), withdrawn_micros=withdrawn.withdrawn_micros)


def slash(request: pb.SlashRequest) -> tuple[str, Fault, str]:
    """Participant, what it did, and where that is recorded. Raises InvalidArgument."""
    participant = names.parse_participant(request.participant, "participant")
    checks = FieldChecks()
    checks.one_of("fault", request.fault, _FAULTS)
    checks.text("evidence", request.evidence, max_chars=_REFERENCE_CHARS)
    checks.finish()
    return participant, _FAULTS[request.fault], request.evidence


def slash_response(slashed: Slashed) -> pb.SlashResponse:
    """The accounts afterwards, and what was taken."""
    return pb.SlashResponse(stake=stake_message(slashed.stake), slashed_micros=slashed.slashed_micros)


def stakes_page(request: pb.ListStakesRequest, tokens: PageTokens) -> tuple[str, int]:
    """The participant after whom the page starts, and its size. Raises InvalidArgument."""
    return tokens.decode(request.page_token, STAKES_QUERY), page_size(request.page_size)


def list_stakes_response(stakes: Sequence[Stake], size: int, tokens: PageTokens) -> pb.ListStakesResponse:
    """One page of `size` out of the stakes read, of which there is one more when there is another page."""
    page = stakes[:size]
    cursor = page[-1].accounts.participant if len(stakes) > size else ""
    return pb.ListStakesResponse(
        stakes=[stake_message(stake) for stake in page], next_page_token=tokens.encode(STAKES_QUERY, cursor)
    )


def events_page(request: pb.ListLedgerEventsRequest) -> tuple[int, int]:
    """The first sequence number wanted, and the size of the page. Raises InvalidArgument."""
    if request.start_sequence < 0:
        raise InvalidArgument.field("start_sequence", f"is {request.start_sequence}, must not be negative")
    return request.start_sequence or 1, page_size(request.page_size, default=_EVENTS_PER_PAGE)


def list_ledger_events_response(page: LedgerPage) -> pb.ListLedgerEventsResponse:
    """Events in order."""
    return pb.ListLedgerEventsResponse(
        events=[_event(event) for event in page.events], next_sequence=page.next_sequence
    )


def stake_message(stake: Stake) -> pb.Stake:
    """One participant's accounts."""
    accounts = stake.accounts
    return pb.Stake(
        name=names.format_stake(accounts.participant),
        available_micros=accounts.available_micros,
        locked_micros=accounts.locked_micros,
        unbonding_micros=accounts.unbonding_micros,
        slashed_micros=accounts.slashed_micros,
        owner_group=stake.owner_group,
        unbondings=[
            pb.Unbonding(amount_micros=waiting.amount_micros, release_time=timestamp(waiting.release_time))
            for waiting in stake.unbondings
        ],
    )


def shown_weight(weight: int) -> int:
    """A weight in 64 bits: one too large for them is shown as the largest. Receipts carry all 128."""
    return min(weight, _UINT64_MAX)


def _amount(amount_micros: int) -> int:
    checks = FieldChecks()
    checks.range("amount_micros", amount_micros, minimum=1, maximum=MAX_MICROS, unit="micro-units")
    checks.finish()
    return amount_micros


def _event(event: LedgerEvent) -> types.LedgerEvent:
    return types.LedgerEvent(
        sequence=event.sequence,
        kind=_EVENT_KINDS[event.kind],
        participant=names.format_participant(event.participant) if event.participant else "",
        amount_micros=event.amount_micros,
        task=names.format_task(event.task) if event.task else "",
        draw=names.format_draw(event.draw) if event.draw else "",
        owner_group=event.owner_group,
        weight=shown_weight(event.weight),
        reference=event.reference,
        time=timestamp(event.time),
        funding_account=event.funding_account,
        fault=_FAULT_NUMBERS[event.fault] if event.fault else types.STAKE_FAULT_UNSPECIFIED,
    )


_EVENT_KINDS = {kind: types.LedgerEventKind.Value(f"LEDGER_EVENT_KIND_{kind.name}") for kind in EventKind}
