"""`tiltyard submit` and `submission`: hand in a model by commit, upload and reveal, and see what became of it."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    CommandError,
    FilterOption,
    JsonOption,
    KeyOption,
    ModelIndexOption,
    OrderOption,
    OriginOption,
    RegistryOption,
    TaskArgument,
    TaskOption,
    connect,
    run,
    task_name,
)
from tiltyard.cli.output import (
    ProgressLine,
    accuracy,
    as_json,
    enum_name,
    enum_word,
    print_json,
    print_message,
    print_table,
)

if TYPE_CHECKING:
    from tiltyard.client import Client
    from tiltyard.registry.v1 import submission_pb2

app = typer.Typer(help="See what became of submissions.", no_args_is_help=True)

_POLL_S = 1.0
FORMATS = {".safetensors": "MODEL_FORMAT_SAFETENSORS", ".onnx": "MODEL_FORMAT_ONNX"}


def describe(submission: "submission_pb2.Submission") -> str:
    """One line on where a submission stands."""
    from tiltyard.type.v1 import evaluation_pb2

    state = enum_word(submission, "state")
    line = f"{submission.name} {state}"
    if submission.state == evaluation_pb2.SUBMISSION_STATE_SCORED and submission.score.total:
        line += f" {accuracy(submission.score.correct, submission.score.total)}"
    if submission.state == evaluation_pb2.SUBMISSION_STATE_REJECTED:
        line += f": {enum_name(submission, 'reason')}"
    return f"{line} ({submission.detail})" if submission.detail else line


async def until_judged(client: "Client", name: str) -> "submission_pb2.Submission":
    """The submission once it has been scored or rejected."""
    from tiltyard.client import persist
    from tiltyard.registry.v1 import submission_pb2
    from tiltyard.type.v1 import evaluation_pb2

    request = submission_pb2.GetSubmissionRequest(name=name)
    ended = (evaluation_pb2.SUBMISSION_STATE_SCORED, evaluation_pb2.SUBMISSION_STATE_REJECTED)
    while True:
        found = (await persist(lambda: client.submissions.GetSubmission(request))).submission
        if found.state in ended:
            return found
        # The contract has no stream of one submission.
        await asyncio.sleep(_POLL_S)


def check_accepted(submission: "submission_pb2.Submission") -> None:
    """Raises CommandError for one that was rejected."""
    from tiltyard.type.v1 import evaluation_pb2

    if submission.state == evaluation_pb2.SUBMISSION_STATE_REJECTED:
        raise CommandError(f"{submission.name} was rejected")


def submit(
    model: Annotated[Path, typer.Argument(help="The model's file: .safetensors or .onnx.")],
    task: TaskOption,
    key: KeyOption,
    model_index: ModelIndexOption = 0,
    journal: Annotated[
        Path | None, typer.Option(help="Where to keep the salt and how far it is; default: beside the model.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Wait until it is scored or rejected.")] = False,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Submit a trained model. Run again after any interruption, it goes on with the same submission.

    With another --journal it makes another submission, as when the first was not revealed in time.
    """
    import grpc

    from tiltyard.client import persist
    from tiltyard.registry.v1 import submission_pb2
    from tiltyard.submitting import submit_model
    from tiltyard.type.v1 import model_pb2

    if model.suffix not in FORMATS:
        raise typer.BadParameter("a model ends in .safetensors or .onnx", param_hint="MODEL")
    name_of_task = task_name(task)
    notes = journal or model.with_name(f"{model.name}.{name_of_task.rpartition('/')[2]}.journal.json")

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            try:
                with ProgressLine("uploading", unit="bytes") as line:
                    name = await submit_model(
                        client,
                        task=name_of_task,
                        model=model,
                        model_index=model_index,
                        format=model_pb2.ModelFormat.Value(FORMATS[model.suffix]),
                        journal=notes,
                        progress=line.update,
                    )
            except grpc.aio.AioRpcError:
                rejected = await _rejected(client, notes)
                if rejected is None:
                    raise
                anew = _anew(rejected, notes)
                raise CommandError(f"{describe(rejected)}{anew and f'; {anew}'}") from None
            request = submission_pb2.GetSubmissionRequest(name=name)
            found = (
                await until_judged(client, name)
                if watch
                else (await persist(lambda: client.submissions.GetSubmission(request))).submission
            )
        print_message(found, as_document=True) if json else print(describe(found))
        if anew := _anew(found, notes):
            print(anew, file=sys.stderr)
        if watch:
            check_accepted(found)

    run(work())


async def _rejected(client: "Client", journal: Path) -> "submission_pb2.Submission | None":
    """The journal's submission, where that has been rejected: then nothing goes on with it."""
    import grpc

    from tiltyard.registry.v1 import submission_pb2
    from tiltyard.submitting import JournalMismatch, read_journal
    from tiltyard.type.v1 import evaluation_pb2

    try:
        name = (await asyncio.to_thread(read_journal, journal)).submission
        if not name:
            return None
        answer = await client.submissions.GetSubmission(submission_pb2.GetSubmissionRequest(name=name))
    except (FileNotFoundError, JournalMismatch, grpc.aio.AioRpcError):
        return None
    return answer.submission if answer.submission.state == evaluation_pb2.SUBMISSION_STATE_REJECTED else None


def _anew(submission: "submission_pb2.Submission", journal: Path) -> str:
    """How to submit its model once more, where that would not be rejected as a copy; empty elsewhere."""
    from tiltyard.type.v1 import evaluation_pb2

    nobodys_copy = (
        evaluation_pb2.REJECTION_REASON_REVEAL_EXPIRED,
        evaluation_pb2.REJECTION_REASON_VALIDATORS_UNAVAILABLE,
    )
    return f"to submit it anew, name another --journal than {journal}" if submission.reason in nobodys_copy else ""


@app.command("list")
def list_submissions(
    task: TaskArgument,
    key: KeyOption,
    filter: FilterOption = "",
    order_by: OrderOption = "",
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """List a task's submissions."""
    from tiltyard.client import pages
    from tiltyard.registry.v1 import submission_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            request = submission_pb2.ListSubmissionsRequest(
                parent=task_name(task), page_size=1000, filter=filter, order_by=order_by
            )
            listed = pages(client.submissions.ListSubmissions, request)
            found = [each async for page in listed for each in page.submissions]
        if json:
            print_json({"submissions": [as_json(each) for each in found]})
        else:
            print_table(
                ("submission", "participant", ""),
                ((each.name, each.participant, describe(each).removeprefix(f"{each.name} ")) for each in found),
            )

    run(work())


@app.command("show")
def show(
    submission: Annotated[str, typer.Argument(metavar="SUBMISSION", help="tasks/{task}/submissions/{n}")],
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Show one submission: its state and why, its draws, its score."""
    from tiltyard.registry.v1 import submission_pb2

    async def work() -> None:
        async with connect(key, origin, registry) as client:
            request = submission_pb2.GetSubmissionRequest(name=submission)
            print_message((await client.submissions.GetSubmission(request)).submission, as_document=json)

    run(work())
