"""`tiltyard task`: post a task, follow it, join it, and take its results."""

import asyncio
import hashlib
import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli import memberships, task_steps
from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    CommandError,
    FilterOption,
    JsonOption,
    KeyOption,
    OrderOption,
    OriginOption,
    RegistryOption,
    TaskArgument,
    connect,
    run,
    task_name,
)
from tiltyard.cli.output import ProgressLine, as_json, enum_word, print_json, print_message, print_table
from tiltyard.cli.task_steps import describe

if TYPE_CHECKING:
    from tiltyard.client import Client
    from tiltyard.registry.v1 import task_pb2
    from tiltyard.type.v1 import task_pb2 as task_type_pb2

app = typer.Typer(help="Create, follow, join and close tasks.", no_args_is_help=True)
app.command("members")(memberships.members)
app.command("verdicts")(memberships.verdicts)
app.command("join")(memberships.join)
app.command("pause")(memberships.pause)
app.command("resume")(memberships.resume)
app.command("leave")(memberships.leave)
app.command("amend")(task_steps.amend)
app.command("close")(task_steps.close)
app.command("cancel")(task_steps.cancel)
app.command("holdout")(task_steps.holdout)


def _read_config(path: Path) -> "task_type_pb2.TaskConfig":
    from google.protobuf.json_format import Parse, ParseError

    from tiltyard.type.v1 import task_pb2 as task_type_pb2

    try:
        return Parse(path.read_text(encoding="utf-8"), task_type_pb2.TaskConfig())
    except (ParseError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} holds no TaskConfig as JSON: {error}") from None


def _fix_digest(digest: "task_type_pb2.DatasetDigest", file: Path) -> None:
    from tiltyard.datasets import Dataset, DatasetError
    from tiltyard.filedigest import file_digest

    try:
        # A task that is cancelled for its dataset keeps its name for good.
        Dataset.open(file)
    except DatasetError as error:
        raise CommandError(f"{file}: {error}") from None
    digest.sha256 = file_digest(file)
    digest.size_bytes = file.stat().st_size


def creation(task_id: str, config: "task_type_pb2.TaskConfig") -> "task_pb2.CreateTaskRequest":
    """The request that creates a task: under one name the same config is the same request, however often it is made."""
    from tiltyard.client import new_request_id
    from tiltyard.registry.v1 import task_pb2

    request = task_pb2.CreateTaskRequest(task_id=task_id, config=config)
    content = request.SerializeToString(deterministic=True)
    request.request_id = hashlib.sha256(content).hexdigest()[:32] if task_id else new_request_id()
    return request


@app.command("create")
def create(
    config: Annotated[Path, typer.Argument(help="TaskConfig as JSON; the digests are filled in.")],
    dataset: Annotated[
        Path, typer.Option(help="The evaluation dataset, a safetensors file (`tiltyard dataset pack`).")
    ],
    key: KeyOption,
    task_id: Annotated[str, typer.Option(help="Last part of the name; the registry makes one up when left out.")] = "",
    holdout: Annotated[Path | None, typer.Option(help="A second dataset that is published after close.")] = None,
    base_model: Annotated[
        Path | None, typer.Option(help="A safetensors file that training starts from; it must fit the one model.")
    ] = None,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Create a task. Uploads its evaluation dataset, and waits until it is open.

    Run again after any interruption with the same --task-id and CONFIG, it goes on with the same task.
    """
    from tiltyard.client import watch
    from tiltyard.registry.v1 import task_pb2
    from tiltyard.transfers import upload
    from tiltyard.type.v1 import task_pb2 as task_type_pb2

    async def work() -> None:
        wanted = _read_config(config)
        _fix_digest(wanted.evaluation_dataset, dataset)
        if holdout is not None:
            _fix_digest(wanted.holdout, holdout)
        async with connect(key, origin, registry) as client:
            if base_model is not None:
                with ProgressLine("uploading the base model", unit="bytes") as line:
                    wanted.base_model = await upload(client.artifacts, base_model, progress=line.update)
            name = (await client.tasks.CreateTask(creation(task_id, wanted))).task.name
            # The answer to an earlier run of this command says what was then.
            task = (await client.tasks.GetTask(task_pb2.GetTaskRequest(name=name))).task
            if task.state == task_type_pb2.TASK_STATE_PREPARING:
                with ProgressLine("uploading", unit="bytes") as line:
                    digest = wanted.evaluation_dataset.sha256
                    await upload(client.artifacts, dataset, task=name, digest=digest, progress=line.update)
            async for seen in watch(client.tasks.WatchTask, task_pb2.WatchTaskRequest(name=name)):
                task = seen.task
                if task.state != task_type_pb2.TASK_STATE_PREPARING:
                    break
        if task.state == task_type_pb2.TASK_STATE_CANCELLED:
            raise CommandError(f"{name} was cancelled: {task.state_reason}")
        print_message(task, as_document=True) if json else print(describe(task))

    run(work())


@app.command("show")
def show(
    task: TaskArgument,
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Show one task."""
    from tiltyard.registry.v1 import task_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            answer = await client.tasks.GetTask(task_pb2.GetTaskRequest(name=task_name(task)))
        print_message(answer.task, as_document=json)

    run(work())


@app.command("list")
def list_tasks(
    key: KeyOption,
    filter: FilterOption = "",
    order_by: OrderOption = "",
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """List tasks, newest first."""
    from tiltyard.client import pages
    from tiltyard.registry.v1 import task_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            request = task_pb2.ListTasksRequest(page_size=1000, filter=filter, order_by=order_by)
            found = [each async for page in pages(client.tasks.ListTasks, request) for each in page.tasks]
        if json:
            print_json({"tasks": [as_json(each) for each in found]})
        else:
            print_table(
                ("task", "name", "state", "nodes", "validators", "submissions"),
                (
                    (
                        each.name,
                        each.config.display_name,
                        enum_word(each, "state"),
                        each.training_nodes,
                        each.validators,
                        each.submissions,
                    )
                    for each in found
                ),
            )

    run(work())


@app.command("watch")
def watch_task(
    task: TaskArgument,
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Print the task now and after each change until it ends.

    With --json one document a line.
    """
    from tiltyard.client import watch
    from tiltyard.registry.v1 import task_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            async for seen in watch(client.tasks.WatchTask, task_pb2.WatchTaskRequest(name=task_name(task))):
                print(json_module.dumps(as_json(seen.task)) if json else describe(seen.task), flush=True)

    run(work())


@app.command("results")
def results(
    task: TaskArgument,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for results.json and the models.")],
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Download the scored models and results.json. For the creator, once the task is closed."""

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            models = await fetch_results(client, task_name(task), out)
        if json:
            print_json({"results": str(out / "results.json"), "models": [str(model) for model in models]})
        else:
            print(f"{len(models)} models and results.json in {out}")

    run(work())


def _check_results(task: "task_pb2.Task", asker: str) -> None:
    """Raises CommandError that says whose a task's results are, and from when on."""
    from tiltyard.type.v1 import task_pb2 as task_type_pb2

    if asker != task.creator:
        raise CommandError(f"the results of {task.name} are for its creator, {task.creator}")
    if task.state == task_type_pb2.TASK_STATE_CANCELLED:
        raise CommandError(f"{task.name} was cancelled and has no results")
    if task.state not in (task_type_pb2.TASK_STATE_CLOSED, task_type_pb2.TASK_STATE_FINAL):
        closes = task.config.schedule.close_time.ToJsonString()
        raise CommandError(f"the results of {task.name} can be had once it is closed: at {closes}, or by `task close`")


async def fetch_results(client: "Client", task: str, out: Path) -> list[Path]:
    """Writes results.json (task, submissions, leaderboard) and each scored model into `out`; returns the models' files.

    Raises CommandError, before anything is written, where they are not for this key, or not yet.
    """
    from tiltyard.client import pages
    from tiltyard.registry.v1 import leaderboard_pb2, submission_pb2, task_pb2
    from tiltyard.transfers import artifact_name, download
    from tiltyard.type.v1 import evaluation_pb2, model_pb2

    known = (await client.tasks.GetTask(task_pb2.GetTaskRequest(name=task))).task
    _check_results(known, client.participant)
    ranking = (await client.leaderboard.GetLeaderboard(leaderboard_pb2.GetLeaderboardRequest(task=task))).leaderboard
    request = submission_pb2.ListSubmissionsRequest(parent=task, page_size=1000)
    submissions = [
        each async for page in pages(client.submissions.ListSubmissions, request) for each in page.submissions
    ]
    await asyncio.to_thread(out.mkdir, parents=True, exist_ok=True)
    files = []
    scored = [each for each in submissions if each.state == evaluation_pb2.SUBMISSION_STATE_SCORED]
    for each in scored:
        ending = "onnx" if each.format == model_pb2.MODEL_FORMAT_ONNX else "safetensors"
        file = out / f"submission-{each.name.rpartition('/')[2]}.{ending}"
        name = artifact_name(each.model_digest)
        with ProgressLine(f"downloading {file.name}", unit="bytes") as line:
            await download(client.artifacts, name, file, size_bytes=each.size_bytes, progress=line.update)
        files.append(file)
    document = {
        "task": as_json(known),
        "submissions": [as_json(each) for each in submissions],
        "leaderboard": as_json(ranking),
    }
    await asyncio.to_thread((out / "results.json").write_text, json_module.dumps(document, indent=2) + "\n")
    return files
