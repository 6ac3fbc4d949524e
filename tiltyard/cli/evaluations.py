"""`tiltyard evaluation`: what validators found, where two of them differ, and the reference to settle it."""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    REGISTRY,
    CommandError,
    JsonOption,
    KeyOption,
    ModelIndexOption,
    OriginOption,
    RegistryOption,
    TaskOption,
    connect,
    fail,
    run,
    task_name,
)
from tiltyard.cli.output import ProgressLine, accuracy, as_json, enum_word, print_json, print_table

if TYPE_CHECKING:
    from tiltyard.client import Client
    from tiltyard.comparing import Comparison
    from tiltyard.registry.v1 import evaluation_pb2
    from tiltyard.type.v1 import task_pb2

app = typer.Typer(help="List what validators found, and compare it sample by sample.", no_args_is_help=True)

_EVALUATION = "tasks/{task}/submissions/{n}/evaluations/{round}-{participant id}"
_MAX_LISTED = 1000
_MOST_JUDGES = 21
# Of the reference, which has said on standard error what is wrong.
_TOLD = 1


async def _read(client: "Client", name: str) -> "evaluation_pb2.Evaluation":
    from tiltyard.registry.v1 import evaluation_pb2

    request = evaluation_pb2.GetEvaluationRequest(name=name, view=evaluation_pb2.EVALUATION_VIEW_FULL)
    return (await client.evaluations.GetEvaluation(request)).evaluation


async def _config(client: "Client", task: str) -> "task_pb2.TaskConfig":
    from tiltyard.registry.v1 import task_pb2

    return (await client.tasks.GetTask(task_pb2.GetTaskRequest(name=task))).task.config


def _outputs(config: "task_pb2.TaskConfig") -> int:
    from tiltyard.type.v1 import task_pb2

    return 2 if config.metric == task_pb2.METRIC_WITHIN_BOUND else config.models[0].outputs


@app.command("list")
def list_evaluations(
    submission: Annotated[str, typer.Argument(metavar="SUBMISSION", help="tasks/{task}/submissions/{n}")],
    key: KeyOption,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """List a submission's evaluations.

    What each validator counted, and what the registry made of it.

    What the training node's own endpoint answered stands in a column of its own: such a report has no vote.
    """
    from tiltyard.client import pages
    from tiltyard.registry.v1 import evaluation_pb2

    async def work() -> "list[evaluation_pb2.Evaluation]":
        async with connect(key, origin, registry) as client:
            request = evaluation_pb2.ListEvaluationsRequest(parent=submission, page_size=1000)
            listed = pages(client.evaluations.ListEvaluations, request)
            return [each async for page in listed for each in page.evaluations]

    found = run(work())
    if json:
        print_json({"evaluations": [as_json(each) for each in found]})
    else:
        headings = ("evaluation", "finding", "by the node's own endpoint", "ambiguous", "mean loss", "verdict")
        print_table(headings, map(row_of, found))


def row_of(each: "evaluation_pb2.Evaluation") -> tuple[object, ...]:
    """The cells of one evaluation in the list."""
    finding, counts = each.finding, each.finding.counts
    ambiguous: object = ""
    loss = ""
    if not each.HasField("report"):
        found = "sealed"
    elif finding.HasField("counts"):
        found = accuracy(counts.correct, counts.total)
        ambiguous, loss = counts.ambiguous, f"{counts.loss_sum_micros / counts.total / 1e6:.4f}"
    else:
        found = enum_word(finding, "fault")
    verdict = enum_word(each, "verdict") if each.verdict else ""
    judged, by_node = ("", found) if finding.node_endpoint else (found, "")
    return each.name, judged, by_node, ambiguous, loss, verdict


@app.command("diff")
def diff(
    left: Annotated[str, typer.Argument(metavar="EVALUATION", help=_EVALUATION)],
    right: Annotated[str, typer.Argument(metavar="EVALUATION", help="Another one of the same submission and round.")],
    key: KeyOption,
    predictions: Annotated[
        list[Path] | None,
        typer.Option("--predictions", help="Recomputed predictions (tiltyard evaluation predict); may be repeated."),
    ] = None,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Compare two evaluations block by block, and name the samples.

    The registry holds hashes of 256 predictions each, so that without more the ranges of 256 rows are named. With
    predictions that are those of one side, single rows of the other are found by its hashes; with both sides' all are.
    Exit status 1 when they differ.
    """
    from tiltyard.comparing import NotComparable, compare

    runs = [path.read_bytes() for path in predictions or []]

    async def work() -> "Comparison":
        async with connect(key, origin, registry) as client:
            one, other = await _read(client, left), await _read(client, right)
            outputs = _outputs(await _config(client, left.partition("/submissions/")[0])) if runs else 0
        try:
            return compare(one, other, runs=runs, outputs=outputs)
        except NotComparable as error:
            raise CommandError(str(error)) from error

    found = run(work())
    print_json(_document(found)) if json else print_comparison(found)
    if found.ranges:
        raise typer.Exit(1)


def _document(found: "Comparison") -> dict[str, Any]:
    return {
        "rows": found.rows,
        "correct": list(found.correct),
        "differing_ranges": [[part.start, part.stop] for part in found.ranges],
        "differing_rows": [{"row": each.row, "left": each.left, "right": each.right} for each in found.named],
        "unnamed_ranges": [[part.start, part.stop] for part in found.unnamed],
        "recomputed": list(found.recomputed),
    }


def print_comparison(found: "Comparison") -> None:
    """A comparison for people."""
    left, right = found.correct
    print(f"left:  {accuracy(left, found.rows)}")
    print(f"right: {accuracy(right, found.rows)}")
    for side, known in zip(("left", "right"), found.recomputed, strict=True):
        if known:
            print(f"the {side} one is exactly what was recomputed")
    if not found.ranges:
        print("every block of predictions is the same")
        return
    if found.named:
        shown = found.named[:_MAX_LISTED]
        print_table(("row", "left", "right"), [(each.row, each.left, each.right) for each in shown])
        if len(found.named) > len(shown):
            print(f"and {len(found.named) - len(shown)} rows more")
    for part in found.unnamed[:_MAX_LISTED]:
        print(f"some of rows {part.start} to {part.stop - 1} differ")


@app.command("predict")
def predict(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The predictions to write.")],
    task: TaskOption,
    data: Annotated[Path, typer.Option("--data", help="The evaluation dataset, a safetensors file.")],
    model: Annotated[Path, typer.Option("--model", help="The submitted model, a safetensors or an ONNX file.")],
    key: KeyOption,
    model_index: ModelIndexOption = 0,
    origin: OriginOption = DEFAULT_ORIGIN,
    registry: RegistryOption = REGISTRY,
    json: JsonOption = False,
) -> None:
    """Recompute the predictions of a model.

    As the reference for disputes does: CPU, float32, rows in order.

    Writes one little-endian int32 a row. For whoever has the dataset: the task's creator, or a drawn validator.
    """

    async def read_config() -> "task_pb2.TaskConfig":
        async with connect(key, origin, registry) as client:
            return await _config(client, task_name(task))

    config = run(read_config())
    if not 0 <= model_index < len(config.models):
        raise typer.BadParameter(
            f"the task has {len(config.models)} models, counted from 0", param_hint="--model-index"
        )
    # In a process of its own: commands start without torch.
    command = [sys.executable, "-m", "tiltyard.models.reference", str(data), str(model), str(out), str(model_index)]
    rows = 0
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,  # noqa: S603 - our own module
        ProgressLine("predicting") as line,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        # One that has ended already says why on standard error.
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(config.SerializeToString())
        for word in child.stdout:
            rows = int(word)
            line.update(0, 0, f"{rows:,} rows")
    if child.returncode == _TOLD:
        raise typer.Exit(1)
    if child.returncode:
        fail(f"the predictions could not be computed, exit status {child.returncode}")
    print_json({"predictions": str(out), "rows": rows}) if json else print(f"{rows} predictions in {out}")


@app.command("capture")
def capture_command(
    pool: Annotated[int, typer.Option(min=1, max=100_000, help="Validators in the pool, of equal weight.")] = 30,
    colluding: Annotated[int, typer.Option(min=0, help="How many of them collude.")] = 10,
    json: JsonOption = False,
) -> None:
    """Say how often colluding validators decide a score.

    For each number of validators per submission.

    No server is asked: the chances follow from the draw and the rules of consensus.
    """
    from tiltyard.collusion import capture

    if colluding > pool:
        raise typer.BadParameter(f"{colluding} is more than the pool has", param_hint="--colluding")
    found = [(k, capture(k, pool=pool, colluding=colluding)) for k in range(1, min(pool, _MOST_JUDGES) + 1, 2)]
    if json:
        print_json({"chances": [{"k": k, "decided": each.decided, "blocked": each.blocked} for k, each in found]})
    else:
        print_table(
            ("k", "colluders decide", "no score", "honest decide"),
            ((k, f"{each.decided:.3%}", f"{each.blocked:.3%}", f"{1 - each.lost:.3%}") for k, each in found),
        )
