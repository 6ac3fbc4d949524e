"""Rows and labels out of the files that people have: npz, CSV, Parquet, folders of images, Hugging Face datasets."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tiltyard.datasources import delimited, huggingface, images, npz, parquet
from tiltyard.datasources.rows import Array, DatasetError, Rows
from tiltyard.datasources.spill import Spill, raw

__all__ = ["Array", "DatasetError", "Rows", "Spill", "check_kind", "raw", "read_batches"]

_READERS: dict[str, Callable[[Path, Path], Iterator[Rows]]] = {
    ".npz": lambda path, scratch: npz.batches(path, scratch=scratch),
    ".csv": lambda path, _: delimited.batches(path, ","),
    ".tsv": lambda path, _: delimited.batches(path, "\t"),
    ".parquet": lambda path, scratch: parquet.batches(path, scratch=scratch),
}


def read_batches(source: Path, *, scratch: Path) -> Iterator[Rows]:
    """The rows of a source, in order, in batches of some MiB: `.npz`, `.csv`, `.tsv`, `.parquet`, or a folder.

    A folder is what `save_to_disk` of Hugging Face's datasets wrote, or has one folder of images a class. No more than
    a batch is held in memory, and what has to be put aside lies in the folder `scratch`, without a name.

    Raises OSError, and DatasetError for what cannot be read; both say where.
    """
    check_kind(source)
    if source.is_dir():
        return huggingface.batches(source) if huggingface.is_dataset(source) else images.batches(source)
    return _READERS[source.suffix.lower()](source, scratch)


def check_kind(source: Path) -> None:
    """Raises DatasetError for a file of a kind that is not read here, whatever is in it, and OSError for none."""
    if not source.is_dir() and source.suffix.lower() not in _READERS:
        source.stat()  # what is not there has no kind, either
        raise DatasetError(f"{source.name}: must be {', '.join(_READERS)} or a folder of images")
