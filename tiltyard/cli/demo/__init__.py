"""`tiltyard demo`: a whole task on real data, one process per participant, checked at the end."""

from pathlib import Path
from typing import Annotated

import typer

from tiltyard.cli.connection import run
from tiltyard.cli.service_settings import DECIDED_BY_DEMO
from tiltyard.cli.up import refuse_set


def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="npz with x (rows of features or images) and y (integer labels); default: digits."),
    ] = None,
    trainers: Annotated[int, typer.Option(min=1, max=50, help="Training nodes, each with a shard of its own.")] = 3,
    validators: Annotated[int, typer.Option(min=1, max=50, help="Validators; three judge each submission.")] = 5,
    export: Annotated[Path | None, typer.Option(help="Folder for log, receipts, keys, models and results.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end; all else to stderr.")] = False,
    state: Annotated[Path | None, typer.Option(help="Folder for all state; default: a fresh temporary one.")] = None,
) -> None:
    """Run a whole task with a process for each participant.

    Exits 0 only when everything that was checked is right. The settings of a service that are set for this command, as
    TILTYARD_LOG_LEVEL, are handed on to it.
    """
    from tiltyard.cli.demo.story import Demo
    from tiltyard.cli.output import print_json

    refuse_set("demo", DECIDED_BY_DEMO)
    result = run(
        Demo(data=data, trainers=trainers, validators=validators, export=export, json=json, state=state).play()
    )
    if json:
        print_json(result.document)
    if not result.succeeded:
        raise typer.Exit(1)
