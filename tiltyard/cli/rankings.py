"""`tiltyard leaderboard`: who leads."""

import json as json_module
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    JsonOption,
    KeyOption,
    OriginOption,
    RegistryOption,
    TaskArgument,
    connect,
    run,
    task_name,
)
from tiltyard.cli.output import as_json, print_json, print_table

if TYPE_CHECKING:
    from tiltyard.registry.v1 import leaderboard_pb2


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
    """Show a task's ranking. With --watch and --json one document a line."""
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
