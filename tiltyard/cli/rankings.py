"""`tiltyard leaderboard`, `draw` and `odds`: who leads, who was drawn, and who may expect to be."""

import json as json_module
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    SELECTOR,
    JsonOption,
    KeyOption,
    OriginOption,
    RegistryOption,
    SelectorOption,
    TaskArgument,
    connect,
    participant_name,
    run,
    task_name,
)
from tiltyard.cli.output import as_json, print_json, print_table

if TYPE_CHECKING:
    from tiltyard.registry.v1 import leaderboard_pb2
    from tiltyard.type.v1 import draw_pb2

draws = typer.Typer(help="Look at draws of validators.", no_args_is_help=True)


def print_leaderboard(board: "leaderboard_pb2.Leaderboard") -> None:
    """The ranking as a table with correct/total."""
    print_table(
        ("rank", "name", "participant", "submission", "correct/total", "accuracy", "95 %"),
        (
            (
                each.rank,
                each.display_name,
                each.participant,
                each.submission,
                f"{each.correct}/{each.total}",
                f"{each.correct / each.total:.4f}" if each.total else "",
                f"{each.interval_low:.4f} to {each.interval_high:.4f}",
            )
            for each in board.entries
        ),
    )


def leaderboard(
    task: TaskArgument,
    key: KeyOption,
    watch: Annotated[bool, typer.Option("--watch", help="Print it again after each change.")] = False,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Show a task's ranking; with --watch and --json one document a line."""
    from tiltyard.client import watch as resume
    from tiltyard.registry.v1 import leaderboard_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            if not watch:
                request = leaderboard_pb2.GetLeaderboardRequest(task=task_name(task))
                board = (await client.leaderboard.GetLeaderboard(request)).leaderboard
                print_json(as_json(board)) if json else print_leaderboard(board)
                return
            async for seen in resume(
                client.leaderboard.WatchLeaderboard, leaderboard_pb2.WatchLeaderboardRequest(task=task_name(task))
            ):
                if json:
                    print(json_module.dumps(as_json(seen.leaderboard)), flush=True)
                else:
                    print_leaderboard(seen.leaderboard)

    run(work())


def print_draw(receipt: "draw_pb2.DrawReceipt") -> None:
    """A draw's seed and order."""
    print(f"{receipt.draw} for {receipt.submission}, round {receipt.round}")
    print(f"seed {receipt.seed.hex()}, pool of {receipt.pool_size} owner groups, root {receipt.pool_root.hex()}")
    total = int.from_bytes(receipt.pool_weight, "big") or 1
    print_table(
        ("place", "participant", "share of the pool", ""),
        (
            (
                each.position,
                each.participant,
                f"{int.from_bytes(each.group_weight, 'big') / total:.1%}",
                "assigned" if each.position < receipt.assigned else "reserve",
            )
            for each in receipt.picks
        ),
    )


@draws.command("show")
def show(
    draw: Annotated[str, typer.Argument(help="draws/{draw}, or the last part of it.")],
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    selector: SelectorOption = SELECTOR,
    json: JsonOption = False,
) -> None:
    """Show a draw with its receipt."""
    from tiltyard.selector.v1 import draw_pb2

    async def work() -> None:
        name = draw if draw.startswith("draws/") else f"draws/{draw}"
        async with connect(key, origin, selector=selector) as client:
            receipt = (await client.draws.GetDraw(draw_pb2.GetDrawRequest(name=name))).receipt
        print_json(as_json(receipt)) if json else print_draw(receipt)

    run(work())


def odds(
    task: TaskArgument,
    key: KeyOption,
    validators: Annotated[int, typer.Option(help="How many are drawn, 1 to 99.")] = 3,
    participant: Annotated[str, typer.Option(help="participants/{id} or the id; the key's own when left out.")] = "",
    origin: OriginOption = DEFAULT_ORIGIN,
    selector: SelectorOption = SELECTOR,
    json: JsonOption = False,
) -> None:
    """Show a validator's weight, its chance of being drawn, and its quota."""
    from tiltyard.selector.v1 import draw_pb2

    async def work() -> None:
        async with connect(key, origin, selector=selector) as client:
            request = draw_pb2.EstimateOddsRequest(
                task=task_name(task),
                validators=validators,
                participant=participant_name(participant) if participant else "",
            )
            answer = await client.draws.EstimateOdds(request)
        if json:
            print_json(as_json(answer))
            return
        error = f" (standard error {answer.standard_error:.4f})" if answer.standard_error else ""
        print(f"weight       {answer.weight} of {answer.pool_weight}")
        print(f"probability  {answer.probability:.4f}{error} of being among {validators}")
        print(f"quota        {answer.quota_used} of {answer.quota_limit} used in this window")

    run(work())
