"""All commands of `tiltyard`, by the words that one types for them."""

import os
from typing import Annotated

import typer

from tiltyard.cli import (
    audits,
    certs,
    datasets,
    demo,
    draws,
    evaluations,
    keys,
    participants,
    rankings,
    records,
    stakes,
    submissions,
    task_exports,
    tasks,
    training,
    trainings,
    up,
    validators,
    witnesses,
)

# gRPC's core, once it is imported, would add lines of its own to what a command prints on a refused connection.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

app = typer.Typer(
    name="tiltyard",
    help="Post learning tasks, train and submit models, judge them as a drawn validator, and check the record.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},  # as wide as the terminal, up to this
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"tiltyard {version('tiltyard')}")
        raise typer.Exit


@app.callback()
def _tiltyard(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version."),
    ] = False,
) -> None:
    """What precedes every command."""


app.command("demo")(demo.demo)
app.command("up")(up.up)
app.add_typer(keys.app, name="key")
app.command("token")(keys.token)
app.command("sign")(keys.sign)
app.add_typer(certs.app, name="certs")
app.add_typer(participants.app, name="participant")
app.add_typer(stakes.app, name="stake")
tasks.app.command("export")(task_exports.export)
app.add_typer(tasks.app, name="task")
app.add_typer(datasets.app, name="dataset")
app.command("train")(training.train)
app.add_typer(trainings.app, name="training")
app.command("submit")(submissions.submit)
app.add_typer(submissions.app, name="submission")
app.add_typer(validators.app, name="validate")
app.command("leaderboard")(rankings.leaderboard)
app.add_typer(evaluations.app, name="evaluation")
app.add_typer(draws.app, name="draw")
app.command("odds")(draws.odds)
records.app.command("verify")(audits.verify)
records.app.command("export")(audits.export)
records.app.command("watch")(witnesses.watch)
app.add_typer(records.app, name="log")
