"""`tiltyard validate`: join as a validator, and see and steer a validator of one's own."""

from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    VALIDATOR,
    JsonOption,
    KeyOption,
    NodeOption,
    OriginOption,
    RegistryOption,
    TaskArgument,
    ValidatorOption,
    connect,
    connect_node,
    run,
    task_name,
)
from tiltyard.cli.memberships import join_task
from tiltyard.cli.output import ProgressLine, accuracy, as_json, enum_word, print_json, print_message, print_table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tiltyard.client import Node
    from tiltyard.validator.v1 import validator_pb2

app = typer.Typer(help="Join tasks as a validator; see and steer a validator.", no_args_is_help=True)


@app.command("join")
def join(
    task: TaskArgument,
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Join TASK as a validator. The key must be the validator's own."""

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            answer = await join_task(client, task_name(task), "validator")
        print_message(answer.member, as_document=json)

    run(work())


@app.command("status")
def status(
    key: KeyOption, validator: ValidatorOption = VALIDATOR, node: NodeOption = "", json: JsonOption = False
) -> None:
    """Show what the validator does now."""
    from tiltyard.validator.v1 import validator_pb2

    async def work() -> None:
        async with connect_node(key, validator, node) as connection:
            answer = await connection.validation.GetStatus(validator_pb2.GetStatusRequest())
        print_message(answer, as_document=json)

    run(work())


def _finding(each: "validator_pb2.EvaluationRun") -> str:
    if each.fault:
        return enum_word(each, "fault")
    return accuracy(each.counts.correct, each.counts.total) if each.HasField("counts") else ""


@app.command("runs")
def runs(
    key: KeyOption, validator: ValidatorOption = VALIDATOR, node: NodeOption = "", json: JsonOption = False
) -> None:
    """List the validator's runs, newest first."""
    from tiltyard.client import pages
    from tiltyard.validator.v1 import validator_pb2

    async def work() -> None:
        async with connect_node(key, validator, node) as connection:
            request = validator_pb2.ListEvaluationRunsRequest(page_size=1000)
            listed = pages(connection.validation.ListEvaluationRuns, request)
            found = [each async for page in listed for each in page.runs]
        if json:
            print_json({"runs": [as_json(each) for each in found]})
        else:
            print_table(
                ("assignment", "state", "rows", "finding", "detail"),
                (
                    (
                        each.assignment,
                        enum_word(each, "state"),
                        f"{each.position}/{each.total}",
                        _finding(each),
                        each.detail,
                    )
                    for each in found
                ),
            )

    run(work())


async def follow(node: "Node", assignment: str) -> "AsyncIterator[validator_pb2.EvaluationRun]":
    """A run until it ends, through breaks of the connection and restarts of the validator."""
    from tiltyard.calls import resuming
    from tiltyard.validator.v1 import validator_pb2

    request = validator_pb2.WatchEvaluationRunRequest(assignment=assignment)
    async for seen in resuming.follow(
        lambda: node.validation.WatchEvaluationRun(request),
        lambda: node.validation.GetStatus(validator_pb2.GetStatusRequest()),
    ):
        yield seen.run


@app.command("watch")
def watch(
    assignment: Annotated[str, typer.Argument(help="tasks/{task}/submissions/{n}/assignments/{round}-{id}.")],
    key: KeyOption,
    validator: ValidatorOption = VALIDATOR,
    node: NodeOption = "",
    json: JsonOption = False,
) -> None:
    """Follow one run until it ends."""
    from tiltyard.validator.v1 import validator_pb2

    async def work() -> None:
        last = validator_pb2.EvaluationRun()
        async with connect_node(key, validator, node) as connection:
            with ProgressLine("evaluating", unit="rows") as line:
                async for last in follow(connection, assignment):
                    line.update(last.position, last.total, f"{last.samples_per_second:,.0f} rows/s")
        print_message(last, as_document=json)

    run(work())


@app.command("drain")
def drain(
    key: KeyOption, validator: ValidatorOption = VALIDATOR, node: NodeOption = "", json: JsonOption = False
) -> None:
    """Let the runs in progress end, and stop the validator."""
    from tiltyard.validator.v1 import validator_pb2

    async def work() -> None:
        async with connect_node(key, validator, node) as connection:
            answer = await connection.validation.Drain(validator_pb2.DrainRequest())
        print_message(answer, as_document=True) if json else print(f"draining, {answer.active} runs in progress")

    run(work())
