"""`tiltyard dataset`: make datasets from the files that people have, and look into them."""

from pathlib import Path
from typing import Annotated

import typer

from tiltyard.cli.connection import JsonOption, fail
from tiltyard.cli.output import ProgressLine, print_json

app = typer.Typer(help="Pack and show datasets.", no_args_is_help=True)


@app.command("pack")
def pack(
    source: Annotated[
        Path,
        typer.Argument(help="npz with x and y, CSV, Parquet, a folder of images by class, or a Hugging Face dataset."),
    ],
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    json: JsonOption = False,
) -> None:
    """Make a dataset of SOURCE."""
    from tiltyard import datasets

    try:
        with ProgressLine("packing") as line:
            datasets.pack(source, out, progress=lambda rows: line.update(0, 0, f"{rows:,} rows read"))
    except (datasets.DatasetError, OSError) as error:
        fail(error)
    _show(out, json)


@app.command("digits")
def digits(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")],
    shards: Annotated[int, typer.Option(min=1, max=50, help="Training nodes to divide the rest among.")] = 1,
) -> None:
    """Write scikit-learn's handwritten digits, ready for a task.

    There are 1,797, divided as `tiltyard demo` divides them.

    DIR gets evaluation.safetensors with 30 % of them, a shard-N.safetensors for each training node, and task.json.
    """
    import json

    from tiltyard.cli.connection import CommandError
    from tiltyard.cli.demo.data import load_digits, models_for, split
    from tiltyard.cli.output import as_json
    from tiltyard.datasets import write_dataset
    from tiltyard.type.v1 import task_pb2

    try:
        divided = split(load_digits(), shards=shards)
        folder.mkdir(parents=True, exist_ok=True)
        rows = {"evaluation": divided.evaluation, **{f"shard-{n}": part for n, part in enumerate(divided.shards, 1)}}
        for name, part in rows.items():
            write_dataset(folder / f"{name}.safetensors", part.x, part.y, labels=part.labels)
            print(f"{folder / name}.safetensors: {len(part.y)} rows")
        config = task_pb2.TaskConfig(
            display_name="Handwritten digits",
            models=[model.spec for model in models_for(divided)],
            class_names=divided.evaluation.labels,
        )
        (folder / "task.json").write_text(json.dumps(as_json(config), indent=2) + "\n")
        print(f"{folder / 'task.json'}: models {', '.join(model.name for model in models_for(divided))}")
    except (CommandError, OSError) as error:
        fail(error)


@app.command("show")
def show(file: Path, json: JsonOption = False) -> None:
    """Show rows, shape, type, classes and digest of a dataset."""
    _show(file, json)


def _show(file: Path, json: bool) -> None:
    from tiltyard import datasets

    try:
        dataset = datasets.Dataset.open(file)
    except datasets.DatasetError as error:
        fail(f"{file}: {error}")
    except OSError as error:
        fail(error)
    labelled = dataset.y.dtype.kind == "i"
    classes = 1 + max((int(part.max()) for _, part in dataset.chunks("y")), default=-1) if labelled else 0
    document = {
        "file": str(file),
        "rows": len(dataset),
        "sample_shape": list(dataset.x.shape[1:]),
        "dtype": str(dataset.x.dtype),
        "classes": classes,
        "labels": dataset.labels,
        "sha256": dataset.digest().hex(),
        "size_bytes": file.stat().st_size,
    }
    if json:
        print_json(document)
        return
    for name, value in document.items():
        if value is not None:
            print(f"{name:<14}{value}")
