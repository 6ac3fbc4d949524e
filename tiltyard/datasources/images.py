"""Folders of images: one folder a class, its name the label; looked at once for modes and sizes, then decoded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tiltyard.datasources.rows import Array, DatasetError, Rows, batch_rows, label_kind, optional, parsed

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
GREY_MODES = frozenset({"1", "L"})


def batches(folder: Path) -> Iterator[Rows]:
    """Grey images as (rows, columns), others as (3, rows, columns), in the order of their names."""
    image = optional("PIL.Image", "Pillow", "folders of images")
    modes: set[str] = set()
    sizes: dict[tuple[int, int], Path] = {}
    labels: set[str] = set()
    for path, label in _found(folder):
        with image.open(path) as opened:
            modes.add(opened.mode)
            sizes.setdefault(opened.size, path)
        if len(sizes) > 1:
            one, other = sizes.values()
            raise DatasetError(f"{one.name} and {other.name} differ in size; all images must have one")
        labels.add(label)
    if not labels:
        raise DatasetError(f"{folder.name}: has no folders with images")
    grey = modes <= GREY_MODES
    kind = "i"
    for label in labels:
        kind = label_kind(label, kind)
    (size,) = sizes
    step = batch_rows(size[0] * size[1] * (1 if grey else 3))
    pixels, theirs = list[Array](), list[str]()
    for path, label in _found(folder):
        with image.open(path) as opened:
            if opened.size != size:
                raise DatasetError(f"{path.name}: was changed while the folder was read")
            pixels.append(pixels_of(opened, grey=grey))
        theirs.append(label)
        if len(pixels) == step:
            yield Rows(np.stack(pixels), parsed(theirs, kind))
            pixels, theirs = [], []
    if pixels:
        yield Rows(np.stack(pixels), parsed(theirs, kind))


def pixels_of(opened: Any, *, grey: bool) -> Array:
    """The bytes of an open image."""
    pixels = np.asarray(opened.convert("L" if grey else "RGB"))
    return pixels if grey else pixels.transpose(2, 0, 1)


def is_grey(opened: Any) -> bool:
    """Whether an open image has no colours."""
    return opened.mode in GREY_MODES


def _found(folder: Path) -> Iterator[tuple[Path, str]]:
    for label in sorted(folder.iterdir()):
        if label.is_dir():
            for path in sorted(label.iterdir()):
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    yield path, label.name
