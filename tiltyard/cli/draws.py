"""`tiltyard draw` and `odds`: who was drawn, why that is right, and who may expect to be."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    SELECTOR,
    CommandError,
    JsonOption,
    KeyOption,
    OriginOption,
    RegistryOption,
    SelectorOption,
    connect,
    fail,
    participant_name,
    run,
    task_name,
)
from tiltyard.cli.output import as_json, enum_name, enum_word, print_json, print_table

if TYPE_CHECKING:
    from tiltyard.client import Client
    from tiltyard.selector.v1 import draw_pb2 as selector_pb2
    from tiltyard.type.v1 import draw_pb2

app = typer.Typer(help="Look at draws of validators, and check them.", no_args_is_help=True)

_DRAW = re.compile(r"(draws/)?[0-9a-f]{32}|tasks/[^/]+/submissions/[0-9]+")


def _checked(draw: str) -> str:
    if draw and not _DRAW.fullmatch(draw):
        raise typer.BadParameter(
            f"{draw!r} is neither draws/{{draw}} nor tasks/{{task}}/submissions/{{n}}; "
            "`tiltyard submission show` names a submission's draws"
        )
    return draw


DrawArgument = Annotated[
    str, typer.Argument(metavar="DRAW", callback=_checked, help="draws/{draw}, or tasks/{task}/submissions/{n}.")
]
OutArgument = Annotated[
    Path | None, typer.Argument(metavar="FILE", help="File to write; standard output when left out.")
]


def print_draw(receipt: "draw_pb2.DrawReceipt") -> None:
    """A draw's seed and order."""
    print(f"{receipt.draw} for {receipt.submission}, round {receipt.round}")
    print(f"seed {receipt.seed.hex()}, pool of {receipt.pool_size} owner groups, root {receipt.pool_root.hex()}")
    total = int.from_bytes(receipt.pool_weight, "big") or 1
    came = [
        (each.place, each.participant, each.group_weight, "assigned" if each.position < receipt.assigned else "reserve")
        for each in receipt.picks
    ] + [
        (
            each.place,
            f"owner group {each.owner_group}",
            each.group_weight,
            "passed over: " + enum_word(each, "reason"),
        )
        for each in receipt.passed_over
    ]
    print_table(
        ("place", "participant", "share of the pool", ""),
        (
            (place, who, f"{int.from_bytes(weight, 'big') / total:.1%}", what)
            for place, who, weight, what in sorted(came)
        ),
    )


@app.command("show")
def show(
    draw: DrawArgument,
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    selector: SelectorOption = SELECTOR,
    json: JsonOption = False,
) -> None:
    """Show a draw with its receipt."""

    async def work() -> None:
        async with connect(key, origin, selector=selector) as client:
            receipt = await _receipt(client, draw)
        print_json(as_json(receipt)) if json else print_draw(receipt)

    run(work())


@app.command("export")
def export(
    draw: DrawArgument,
    key: KeyOption,
    out: OutArgument = None,
    origin: OriginOption = DEFAULT_ORIGIN,
    selector: SelectorOption = SELECTOR,
) -> None:
    """Write a draw's receipt as JSON, for `tiltyard draw verify`."""
    from tiltyard.receipts import receipt_to_json

    async def work() -> None:
        async with connect(key, origin, selector=selector) as client:
            _write(receipt_to_json(await _receipt(client, draw)), out)

    run(work())


@app.command("key")
def selector_key(
    key: KeyOption,
    out: OutArgument = None,
    origin: OriginOption = DEFAULT_ORIGIN,
    selector: SelectorOption = SELECTOR,
) -> None:
    """Write the selector's BLS public key in hex. The arena's record log names it in its first leaf."""
    from tiltyard.selector.v1 import draw_pb2

    async def work() -> None:
        async with connect(key, origin, selector=selector) as client:
            answer = await client.draws.GetSelectorKey(draw_pb2.GetSelectorKeyRequest())
        _write(answer.public_key.hex() + "\n", out)

    run(work())


@app.command("verify")
def verify(
    receipt: Annotated[Path, typer.Argument(metavar="RECEIPT.json", help="What `tiltyard draw export` wrote.")],
    key: Annotated[Path, typer.Option("--key", help="File with the selector's BLS public key in hex.")],
    json: JsonOption = False,
) -> None:
    """Check a receipt offline, and say what it proves. Exits with 1 when anything in it does not hold."""
    from tiltyard.receipts import NOT_PROVED, ReceiptInvalid, receipt_from_json, verify_receipt

    try:
        text = receipt.read_text(encoding="utf-8")
        selector = bytes.fromhex(key.read_text(encoding="ascii").strip())
    except OSError as error:
        fail(error)
    except UnicodeDecodeError:
        fail("receipt and key are text files")
    except ValueError:
        fail(f"{key} holds no BLS public key in hex")
    try:
        proved = verify_receipt(receipt_from_json(text), selector_key=selector)
    except ReceiptInvalid as error:
        if json:
            print_json({"verified": False, "reason": error.reason})
        else:
            print(f"not verified: {error.reason}", file=sys.stderr)
        raise typer.Exit(1) from None
    if json:
        print_json({"verified": True, "proved": proved, "not_proved": list(NOT_PROVED)})
        return
    for claim in proved:
        print(f"proved: {claim}")
    for claim in NOT_PROVED:
        print(f"not proved here: {claim}")


def odds(
    key: KeyOption,
    task: Annotated[str, typer.Argument(metavar="TASK", help="tasks/{task}, or the last part of it.")] = "",
    validators: Annotated[
        int | None, typer.Option(min=1, max=99, help="How many are drawn; as many as the task says when left out.")
    ] = None,
    draw: Annotated[
        str, typer.Option(callback=_checked, help="Say why this draw did not pick the participant; as for `draw show`.")
    ] = "",
    participant: Annotated[str, typer.Option(help="participants/{id} or the id; the key's own when left out.")] = "",
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    selector: SelectorOption = SELECTOR,
    json: JsonOption = False,
) -> None:
    """Show a validator's weight, chance and quota in a task.

    Also what splitting the stake would gain.
    """
    from tiltyard.selector.v1 import draw_pb2

    async def work() -> None:
        if not task and not draw:
            raise CommandError("name a task, or a draw with --draw")
        async with connect(key, origin, registry=registry, selector=selector) as client:
            whose = participant_name(participant or client.key.id)
            if draw:
                await _explain(client, await _receipt(client, draw), whose, as_document=json)
                return
            drawn = validators or await _drawn(client, task_name(task))
            request = draw_pb2.EstimateOddsRequest(task=task_name(task), validators=drawn, participant=whose)
            answer = await client.draws.EstimateOdds(request)
        print_json(as_json(answer)) if json else _print_odds(answer, drawn)

    run(work())


async def _drawn(client: "Client", task: str) -> int:
    """How many validators the task's submissions are given."""
    from tiltyard.registry.v1 import task_pb2

    return (await client.tasks.GetTask(task_pb2.GetTaskRequest(name=task))).task.config.validators_per_submission


def _print_odds(answer: "selector_pb2.EstimateOddsResponse", validators: int) -> None:
    error = f"simulated, standard error {answer.standard_error:.1g}" if answer.standard_error else "exact"
    print(f"weight       {answer.weight} of {answer.pool_weight}")
    print(f"probability  {answer.probability:.6g} of being among {validators} ({error})")
    left = max(0, answer.quota_limit - answer.quota_used)
    refill = answer.refill_time.ToJsonString()
    print(f"quota        {left} of {answer.quota_limit} left in this window, full again at {refill}")
    if answer.best_split > 1:
        print(
            f"splitting    this stake over {answer.best_split} funding accounts would weigh "
            f"{answer.split_gain:.3g} times as much; over one funding account it gains nothing"
        )


async def _explain(client: "Client", receipt: "draw_pb2.DrawReceipt", whose: str, *, as_document: bool) -> None:
    """Why a draw did or did not pick somebody, by the receipt and the owner group."""
    from tiltyard.selector.v1 import stake_pb2

    name = f"stakes/{whose.removeprefix('participants/')}"
    group = (await client.stakes.GetStake(stake_pb2.GetStakeRequest(name=name))).stake.owner_group
    outcome, place = outcome_of(receipt, whose, group)
    if as_document:
        print_json({"draw": receipt.draw, "participant": whose, "owner_group": group, "place": place, "why": outcome})
    else:
        print(f"{receipt.draw}: {outcome}")


def outcome_of(receipt: "draw_pb2.DrawReceipt", participant: str, owner_group: str) -> tuple[str, int | None]:
    """What a draw made of a participant, in words, and its group's place in the order, None when it did not come up."""
    for pick in receipt.picks:
        if pick.participant == participant:
            role = "assigned" if pick.position < receipt.assigned else "a reserve"
            return f"picked at place {pick.place}, {role}", pick.place
    for pick in receipt.picks:
        if participant in pick.members or pick.owner_group == owner_group:
            return f"its owner group's place {pick.place} went to another member, {pick.participant}", pick.place
    for over in receipt.passed_over:
        if over.owner_group == owner_group:
            name = enum_name(over, "reason")
            reason = _REASONS.get(name, f"reason {name}")
            return f"passed over at place {over.place}: {reason}", over.place
    last = len(receipt.picks) + len(receipt.passed_over) - 1
    return f"its place did not come up: it was not in the pool, or comes after place {last}", None


_REASONS = {
    "SUBMITTER": "it is the submitter, or of the submitter's owner group",
    "PAUSED": "all members of its owner group were paused",
    "QUOTA": "its owner group's quota for the window was used up",
    "TASK_CREATOR": "it is the task creator, or of the creator's owner group",
    "ALREADY_PICKED": "it had become one with an owner group that has a pick",
    "LEFT": "all members of its owner group had left the pool",
}


async def _receipt(client: "Client", draw: str) -> "draw_pb2.DrawReceipt":
    import grpc

    from tiltyard.selector.v1 import draw_pb2
    from tiltyard.sortition import draw_id

    of_submission = draw.startswith("tasks/")
    # Round 1 is on the evaluation dataset; a holdout's draw goes by its own name.
    name = f"draws/{draw_id(draw, 1) if of_submission else draw.removeprefix('draws/')}"
    try:
        return (await client.draws.GetDraw(draw_pb2.GetDrawRequest(name=name))).receipt
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        unknown = f"validators have not been drawn for {draw}, or there is no such submission"
        raise CommandError(unknown if of_submission else f"there is no draw {name}") from None


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
