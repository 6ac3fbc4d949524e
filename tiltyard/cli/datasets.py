"""`tiltyard dataset`: make datasets from the files that people have, and look into them."""

from pathlib import Path
from typing import Annotated

import typer

from tiltyard.cli.connection import JsonOption, fail
from tiltyard.cli.output import print_json

app = typer.Typer(help="Pack and show datasets.", no_args_is_help=True)


@app.command("pack")
def pack(
    source: Annotated[Path, typer.Argument(help="npz with x and y, CSV, Parquet, or a folder of images by class.")],
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    json: JsonOption = False,
) -> None:
    """Make a dataset of SOURCE."""
    from tiltyard import datasets

    try:
        datasets.pack(source, out)
    except (datasets.DatasetError, OSError) as error:
        fail(str(error))
    _show(out, json)


@app.command("show")
def show(file: Path, json: JsonOption = False) -> None:
    """Show rows, shape, type, classes and digest of a dataset."""
    _show(file, json)


def _show(file: Path, json: bool) -> None:
    import numpy as np

    from tiltyard import datasets

    try:
        dataset = datasets.Dataset.open(file)
    except (datasets.DatasetError, OSError) as error:
        fail(str(error))
    classes = int(np.max(dataset.y)) + 1 if dataset.y.dtype.kind == "i" and len(dataset.y) else 0
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
