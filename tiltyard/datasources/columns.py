"""Columns of Arrow as arrays of numpy."""

import importlib
from typing import Any

from tiltyard.datasources.rows import Array, DatasetError, texts


def numbers(arrow: Any, name: str, column: Any) -> Array:
    """Numbers, or lists of numbers that are all of one length; integers with gaps become floats with NaN."""
    column = _plain(arrow, column)
    try:
        values = _stacked(arrow, column) if _is_list(arrow, column.type) else _numpy(arrow, column)
    except (ValueError, TypeError) as error:
        raise DatasetError(f"column {name!r}: {error}") from error
    if values.dtype.kind not in "biuf":
        raise DatasetError(f"column {name!r} holds {values.dtype}, which are no numbers")
    return values


def labels(arrow: Any, column: Any) -> Array:
    """Numbers or texts."""
    values = _numpy(arrow, _plain(arrow, column))
    return texts(values) if values.dtype.kind == "O" else values


def _plain(arrow: Any, column: Any) -> Any:
    """Without what is only a way to store it or to speak of it."""
    if isinstance(column, arrow.ExtensionArray):
        column = column.storage
    return column.dictionary_decode() if arrow.types.is_dictionary(column.type) else column


def _numpy(arrow: Any, column: Any) -> Array:
    values: Array = arrow.chunked_array([column]).to_numpy()
    return values


def _is_list(arrow: Any, kind: Any) -> bool:
    types = arrow.types
    return bool(
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _stacked(arrow: Any, column: Any) -> Array:
    compute = importlib.import_module("pyarrow.compute")
    shape = [len(column)]
    while _is_list(arrow, column.type):
        if column.null_count:
            raise ValueError("has gaps")
        lengths = compute.unique(compute.list_value_length(column)).to_pylist()
        if len(lengths) > 1:
            raise ValueError(f"has lists of different lengths, {lengths[0]} and {lengths[1]}")
        shape.append(lengths[0] if lengths else 0)
        column = column.flatten()
    if column.null_count:
        raise ValueError("has gaps in its lists")
    return _numpy(arrow, column).reshape(shape)
