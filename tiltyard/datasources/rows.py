"""What every kind of source gives: rows in batches of bounded size."""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LABEL_COLUMN = "y"
MAX_LABEL_CHARS = 1024
# As much as makes the work on a batch outweigh what it costs to begin one. Texts are the reason for the second bound:
# each takes as much room as the longest beside it.
BATCH_BYTES = 8 * 1024 * 1024
BATCH_ROWS = 1 << 14


class DatasetError(ValueError):
    """A file that is no dataset, or arrays that cannot be made into one; the text is for its author."""


@dataclass(frozen=True)
class Rows:
    """Features [n, ...], and for each row its label or targets as they were written, numbers or texts.

    From batch to batch of one source the numbers' dtype may widen: a column of integers with a gap holds floats.
    """

    x: Array
    y: Array


def batch_rows(row_bytes: int) -> int:
    """How many rows of this size make up a batch."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))


def texts(labels: Sequence[Any] | Array) -> Array:
    """Labels as an array of texts. Raises DatasetError for one over 1024 characters, which names nothing."""
    longest = max((len(label) for label in labels if isinstance(label, str | bytes)), default=0)
    if longest > MAX_LABEL_CHARS:
        raise DatasetError(f"a label has {longest} characters, over {MAX_LABEL_CHARS}")
    return np.array(labels, dtype=np.str_) if isinstance(labels, list) else np.asarray(labels).astype(np.str_)


def label_kind(label: str, before: str = "i") -> str:
    """What labels up to this one are, given what those before it are: integers `i`, else floats `f`, else texts `U`."""
    if before == "i":
        try:
            if -(2**63) <= int(label) < 2**63:
                return "i"
        except ValueError:
            pass
    if before != "U" and is_number(label) and math.isfinite(float(label)):
        return "f"
    return "U"


def parsed(labels: list[str], kind: str) -> Array:
    """Labels as `label_kind` has found them to be. Raises DatasetError for one that is not."""
    if kind == "U":
        return texts(labels)
    try:
        return np.array([int(each) for each in labels], np.int64) if kind == "i" else np.array(list(map(float, labels)))
    except (ValueError, OverflowError) as error:
        raise DatasetError(f"the labels were changed while they were read: {error}") from error


def is_number(text: str) -> bool:
    """Whether a cell is a number, an infinite one and NaN among them."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def optional(module: str, package: str, purpose: str) -> Any:
    """A module of a package that only some sources need. Raises DatasetError naming the package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DatasetError(f"{purpose} need the package {package}: pip install {package}") from error
