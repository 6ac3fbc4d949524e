"""`tiltyard stake`: deposits by the operator, and what holders see and take back."""

from typing import Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    SELECTOR,
    JsonOption,
    KeyOption,
    OriginOption,
    SelectorOption,
    connect,
    participant_name,
    run,
)
from tiltyard.cli.output import as_json, print_json, print_message, print_table

app = typer.Typer(help="Deposit, show and withdraw stake; amounts are micro-units.", no_args_is_help=True)

_MOST_MICROS = 2**63 - 1
AmountArgument = Annotated[
    int, typer.Argument(min=1, max=_MOST_MICROS, metavar="MICROS", help="Amount in micro-units, 1 or more.")
]


@app.command("deposit")
def deposit(
    participant: Annotated[str, typer.Argument(metavar="PARTICIPANT", help="participants/{id} or the id.")],
    amount_micros: AmountArgument,
    reference: Annotated[str, typer.Option(help="Where the payment can be found outside; unique.")],
    funding_account: Annotated[str, typer.Option(help="The money's source; one source counts as one in draws.")],
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    selector: SelectorOption = SELECTOR,
    json: JsonOption = False,
) -> None:
    """Add to a participant's stake. For operators."""
    from tiltyard.client import new_request_id
    from tiltyard.selector.v1 import stake_pb2

    async def work() -> None:
        async with connect(key, origin, selector=selector) as client:
            request = stake_pb2.DepositRequest(
                participant=participant_name(participant),
                amount_micros=amount_micros,
                reference=reference,
                funding_account=funding_account,
                request_id=new_request_id(),
            )
            answer = await client.stakes.Deposit(request)
        print_message(answer.stake, as_document=json)

    run(work())


@app.command("show")
def show(
    key: KeyOption,
    participant: Annotated[str, typer.Argument(help="participants/{id} or the id; the key's own when left out.")] = "",
    origin: OriginOption = DEFAULT_ORIGIN,
    selector: SelectorOption = SELECTOR,
    json: JsonOption = False,
) -> None:
    """Show one participant's accounts."""
    from tiltyard.selector.v1 import stake_pb2

    async def work() -> None:
        async with connect(key, origin, selector=selector) as client:
            whose = participant.removeprefix("participants/") or client.key.id
            answer = await client.stakes.GetStake(stake_pb2.GetStakeRequest(name=f"stakes/{whose}"))
        print_message(answer.stake, as_document=json)

    run(work())


@app.command("list")
def list_stakes(
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    selector: SelectorOption = SELECTOR,
    json: JsonOption = False,
) -> None:
    """List the accounts of everybody who has or had stake."""
    from tiltyard.client import pages
    from tiltyard.selector.v1 import stake_pb2

    async def work() -> None:
        async with connect(key, origin, selector=selector) as client:
            request = stake_pb2.ListStakesRequest(page_size=1000)
            found = [each async for page in pages(client.stakes.ListStakes, request) for each in page.stakes]
        if json:
            print_json({"stakes": [as_json(each) for each in found]})
        else:
            print_table(
                ("stake", "available", "locked", "unbonding", "slashed", "owner group"),
                (
                    (
                        each.name,
                        each.available_micros,
                        each.locked_micros,
                        each.unbonding_micros,
                        each.slashed_micros,
                        each.owner_group,
                    )
                    for each in found
                ),
            )

    run(work())


@app.command("request-withdrawal")
def request_withdrawal(
    amount_micros: AmountArgument,
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    selector: SelectorOption = SELECTOR,
    json: JsonOption = False,
) -> None:
    """Ask available stake back.

    `tiltyard stake withdraw` takes it after the waiting time.
    """
    from tiltyard.client import new_request_id
    from tiltyard.selector.v1 import stake_pb2

    async def work() -> None:
        async with connect(key, origin, selector=selector) as client:
            request = stake_pb2.RequestWithdrawalRequest(amount_micros=amount_micros, request_id=new_request_id())
            answer = await client.stakes.RequestWithdrawal(request)
        print_message(answer, as_document=json)

    run(work())


@app.command("withdraw")
def withdraw(
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    selector: SelectorOption = SELECTOR,
    json: JsonOption = False,
) -> None:
    """Take out all stake whose waiting time is over."""
    from tiltyard.client import new_request_id
    from tiltyard.selector.v1 import stake_pb2

    async def work() -> None:
        async with connect(key, origin, selector=selector) as client:
            answer = await client.stakes.Withdraw(stake_pb2.WithdrawRequest(request_id=new_request_id()))
        print_message(answer, as_document=json)

    run(work())
