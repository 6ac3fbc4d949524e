"""Packing by batches gives the bytes that arrays in memory give, says what is wrong, and leaves nothing half done."""

import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiltyard.datasets import Dataset, DatasetError, pack, write_dataset

ROWS = 61
RANDOM = np.random.default_rng(5)
BYTES = RANDOM.integers(0, 256, (ROWS, 3))
FEATURES = {
    "bytes": BYTES,
    "bytes as floats": BYTES.astype(np.float64),
    "a fraction at the end": np.where(np.arange(ROWS * 3).reshape(ROWS, 3) == ROWS * 3 - 1, 0.5, BYTES),
    "negative zeros before a fraction": np.vstack([np.full((ROWS - 1, 3), -0.0), [[1, 2, 0.5]]]),
    "infinite and NaN": np.where(BYTES[-1, -1] == BYTES, np.inf, np.where(BYTES < 9, np.nan, BYTES)),
    "over float32": np.where(BYTES > 250, 1e300, BYTES),
    "one wide integer": np.where(np.arange(ROWS * 3).reshape(ROWS, 3) == 100, -(1 << 40), BYTES),
    "half floats": (BYTES / 8).astype(np.float16),
    "booleans": BYTES > 99,
    "images": RANDOM.integers(-9, 256, (ROWS, 2, 3, 2)),
    "big-endian": BYTES.astype(">u2"),
}
WORDS = np.array(["late", "a", "longer word", "é"])
LABELS = {
    "integers": RANDOM.integers(-4, 4, ROWS),
    "words": WORDS[RANDOM.integers(0, 4, ROWS)],
    "bytes": np.array([b"b", b"a", b"ccc"])[RANDOM.integers(0, 3, ROWS)],
    "booleans": RANDOM.integers(0, 2, ROWS) > 0,
    "one column": RANDOM.integers(0, 4, (ROWS, 1)),
    "targets": RANDOM.random(ROWS),
    "several targets": RANDOM.random((ROWS, 2)),
}


@pytest.fixture(params=[1, 7, 1000])
def _batch_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one row, of some, and of all: what decides a dtype or a class may be in any of them."""
    monkeypatch.setattr("tiltyard.datasources.rows.BATCH_ROWS", request.param)


def whole(path: Path, x: np.ndarray, y: np.ndarray) -> bytes:
    """The file of arrays that are in memory."""
    if y.dtype.kind == "f":
        write_dataset(path, x, y.astype(np.float64))
    else:
        names, classes = np.unique(y, return_inverse=True)
        labels = [name.decode() if isinstance(name, bytes) else name for name in names.tolist()]
        labels = [int(name) if isinstance(name, bool) else name for name in labels]
        write_dataset(path, x, classes.reshape(-1), labels=labels)
    return path.read_bytes()


@pytest.mark.usefixtures("_batch_rows")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("x", FEATURES.values(), ids=FEATURES)
def test_features_of_npz_become_what_they_become_in_memory(
    tmp_path: Path, x: np.ndarray, save: Callable[..., None]
) -> None:
    for name, laid_out in (("rows.npz", x), ("columns.npz", np.asfortranarray(x))):
        save(tmp_path / name, x=laid_out, y=LABELS["integers"])
        pack(tmp_path / name, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == whole(tmp_path / "whole", x, LABELS["integers"])


@pytest.mark.usefixtures("_batch_rows")
@pytest.mark.parametrize("y", LABELS.values(), ids=LABELS)
def test_labels_of_npz_become_what_they_become_in_memory(tmp_path: Path, y: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", x=BYTES, y=y)
    pack(tmp_path / "a.npz", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == whole(tmp_path / "whole", BYTES, y)


@pytest.mark.usefixtures("_batch_rows")
@pytest.mark.parametrize("name", ["integers", "words", "targets"])
@pytest.mark.parametrize("x", [x for x in FEATURES.values() if x.ndim == 2 and x.dtype.kind in "if"])
def test_csv_becomes_what_it_becomes_in_memory(tmp_path: Path, x: np.ndarray, name: str) -> None:
    x = x.astype(np.float64) if x.dtype.kind == "f" else x
    rows = zip(x.tolist(), LABELS[name].tolist(), strict=True)
    (tmp_path / "a.csv").write_text("".join(f"{','.join(map(str, cells))},{label}\n" for cells, label in rows))
    pack(tmp_path / "a.csv", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == whole(tmp_path / "whole", x.astype(np.float64), LABELS[name])


@pytest.mark.usefixtures("_batch_rows")
@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "2", "x"], ("1", "2", "x")),
        (["3", "-1", "3"], (-1, 3)),
        (["1", str(1 << 63), "2"], None),
        (["1", "2.5", "inf"], ("1", "2.5", "inf")),
        (["1", "2.5", "3"], None),
    ],
)
def test_what_labels_of_csv_are_is_decided_by_all_of_them(
    tmp_path: Path, cells: Sequence[str], expected: tuple[int | str, ...] | None
) -> None:
    (tmp_path / "a.csv").write_text("".join(f"0,{cell}\n" for cell in cells))
    assert pack(tmp_path / "a.csv", tmp_path / "out").labels == expected


def parquet(path: Path, table: Any) -> None:
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=10)


def hugging_face(path: Path, table: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    path.mkdir()
    for name, start, rows in (("a", 0, 20), ("b", 20, 0), ("c", 20, ROWS)):
        with arrow.OSFile(str(path / name), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.slice(start, rows), 15)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in "abc"]}))


@pytest.mark.usefixtures("_batch_rows")
@pytest.mark.parametrize("write", [parquet, hugging_face])
@pytest.mark.parametrize("columns_at_once", [1, 2, 16])
def test_tables_become_what_they_become_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Any], None], columns_at_once: int
) -> None:
    monkeypatch.setattr("tiltyard.datasources.parquet.COLUMNS_AT_ONCE", columns_at_once)
    arrow = pytest.importorskip("pyarrow")
    wide = (1 << 60) + 1  # no float64, so a gap anywhere in its column rounds it
    tables: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"a": BYTES[:, 0], "b": BYTES[:, 1] / 4}, np.stack([BYTES[:, 0], BYTES[:, 1] / 4], axis=1)),
        (
            {"a": BYTES[:, 0].astype(np.int8), "b": BYTES[:, 1].astype(np.uint16)},
            np.stack([BYTES[:, 0].astype(np.int8), BYTES[:, 1].astype(np.uint16)], axis=1),
        ),
        ({"a": [wide] * (ROWS - 1) + [None], "b": BYTES[:, 1]}, np.array([[wide, b] for b in BYTES[:, 1]], float)),
        ({"a": BYTES[:, 0] > 9, "b": BYTES[:, 1] > 9}, BYTES[:, :2] > 9),
    ]
    tables[2][1][-1, 0] = np.nan
    for index, (columns, x) in enumerate(tables):
        for name in ("integers", "words", "targets"):
            source = tmp_path / f"{index}-{name}.parquet"
            write(source, arrow.table(columns | {"y": LABELS[name]}))
            pack(source, tmp_path / "out")
            assert (tmp_path / "out").read_bytes() == whole(tmp_path / "whole", x, LABELS[name]), (index, name)


@pytest.mark.usefixtures("_batch_rows")
@pytest.mark.parametrize("dtype", ["int8", "uint64", "float32", "bool_"])
def test_lists_of_a_hugging_face_dataset_become_what_they_become_in_memory(tmp_path: Path, dtype: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    value = getattr(arrow, dtype)()
    x = (BYTES > 99) if dtype == "bool_" else (BYTES // 2).astype(dtype)
    nested = [[row[:1], row[1:2], row[2:]] for row in x.tolist()]
    kinds = {
        "flat": (arrow.list_(value), x.tolist(), x),
        "large": (arrow.large_list(value), x.tolist(), x),
        "fixed": (arrow.list_(value, 3), x.tolist(), x),
        "nested": (arrow.list_(arrow.list_(value)), nested, x[:, :, None]),
    }
    for name, (kind, values, expected) in kinds.items():
        hugging_face(tmp_path / name, arrow.table({"x": arrow.array(values, kind), "label": LABELS["integers"]}))
        pack(tmp_path / name, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == whole(tmp_path / "whole", expected, LABELS["integers"]), name


def test_a_category_that_is_missing_is_not_taken_for_another(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    labels = arrow.array(["a", None, "b"]).dictionary_encode()
    parquet(tmp_path / "a.parquet", arrow.table({"x": [1, 2, 3], "y": labels}))
    assert pack(tmp_path / "a.parquet", tmp_path / "out").labels == ("None", "a", "b")


@pytest.mark.usefixtures("_batch_rows")
@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"x": [1, 2, 3], "t": ["a", "b", "c"], "y": [0, 1, 0]}, "a.parquet: column 't' holds object"),
        ({"x": [True, None, True], "y": [0, 1, 0]}, "a.parquet: column 'x' holds object"),
        ({"x": [[1], [2], [3]], "y": [0, 1, 0]}, "a.parquet: column 'x' holds lists"),
        ({"y": [0, 1, 0]}, "a.parquet: needs at least one column of features"),
        ({"x": [1, 2, 3], "y": [0.5, 1, 0]}, "y holds fractions"),
        ({"x": [1, 2, 3], "y": [1e30, 1, 0]}, "y holds 1e.30, which is over the range of int64"),
        ({"x": [1, 2, 3], "y": ["a" * 1025, "b", "b"]}, "a label has 1025 characters"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    parquet(tmp_path / "a.parquet", pytest.importorskip("pyarrow").table(columns))
    with pytest.raises(DatasetError, match=said):
        pack(tmp_path / "a.parquet", tmp_path / "out", regression=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"x": [[1, 2], [3], [4, 5]]}, "'x': has lists of different lengths, 2 and 1"),
        ({"x": [[1, 2], None, [4, 5]]}, "'x': has gaps"),
        ({"x": [[1, 2], [3, None], [4, 5]]}, "'x': has gaps in its lists"),
        ({"x": [["a"], ["b"], ["c"]]}, "'x' holds object, which are no numbers"),
        ({"x": [1, 2, 3], "z": [[1], [2], [3]]}, "must have the same shape"),
        ({"x": [{"bytes": b"no image"}] * 3}, "'x': cannot identify"),
    ],
)
def test_what_is_wrong_in_a_hugging_face_dataset_is_named(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    hugging_face(tmp_path / "d", pytest.importorskip("pyarrow").table(columns | {"label": [0, 1, 0]}))
    with pytest.raises(DatasetError, match=f"d: .*{said}"):
        pack(tmp_path / "d", tmp_path / "out")


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".parquet"])
def test_a_broken_file_is_no_dataset(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("pyarrow")
    source = tmp_path / f"a{suffix}"
    for content in (b"", b"\xff\xfe\x00\x01" * 9, b"PAR1\0\0\0\0PAR1"):
        source.write_bytes(content)
        with pytest.raises(DatasetError, match=rf"a\{suffix}"):
            pack(source, tmp_path / "out")


def test_a_broken_hugging_face_dataset_is_none(tmp_path: Path) -> None:
    table = pytest.importorskip("pyarrow").table({"x": [1, 2, 3], "label": [0, 1, 0]})
    hugging_face(tmp_path / "d", table)
    good = (tmp_path / "d" / "a").read_bytes()
    for content in (b"", b"\xff" * 99, good[:-60], good[:200]):
        (tmp_path / "d" / "a").write_bytes(content)
        with pytest.raises(DatasetError, match="d: "):
            pack(tmp_path / "d", tmp_path / "out")
    (tmp_path / "d" / "a").unlink()
    with pytest.raises(FileNotFoundError):
        pack(tmp_path / "d", tmp_path / "out")
    hugging_face(tmp_path / "e", table.rename_columns(["other", "label"]))
    (tmp_path / "e" / "c").write_bytes(good)
    with pytest.raises(DatasetError, match="e: c has other columns"):
        pack(tmp_path / "e", tmp_path / "out")


def test_an_npz_that_was_damaged_or_cut_is_no_dataset(tmp_path: Path) -> None:
    source = tmp_path / "a.npz"
    for save in (np.savez, np.savez_compressed):
        save(source, x=BYTES, y=LABELS["integers"])
        good = source.read_bytes()
        at = good.index(b"x.npy") + 300
        source.write_bytes(good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :])
        with pytest.raises(DatasetError, match=r"a\.npz"):
            pack(source, tmp_path / "out")
        source.write_bytes(good[: len(good) // 2])
        with pytest.raises(DatasetError, match=r"a\.npz"):
            pack(source, tmp_path / "out")
    for words in (b"{'descr': (", b"  {\n 1\n"):
        header = words.ljust(118)
        with zipfile.ZipFile(source, "w") as archive:
            for name in ("x.npy", "y.npy"):
                archive.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        with pytest.raises(DatasetError, match=r"a\.npz"):
            pack(source, tmp_path / "out")


def test_csv_names_line_and_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.csv"
    for text, said in (
        ("a,b,y\n1,2,0\n\n3,four,1\n", "a.csv:4: column 'b': 'four' is no number"),
        ("1,2,0\n1,,0\n", "a.csv:2: column '2': '' is no number"),
        ("y,a\n0,1\n1,2,3\n", "a.csv:3: 3 columns, not 2"),
        (f"1,{'x' * 1025}\n", "a.csv:1: a label of 1025 characters"),
        ('1,0\n2,"' + "x" * 200_000, "a.csv:2: field larger"),
    ):
        source.write_text(text)
        with pytest.raises(DatasetError, match=said):
            pack(source, tmp_path / "out")
    monkeypatch.setattr("tiltyard.datasources.delimited.MAX_LINE_CHARS", 20)
    source.write_text("1,0\n" + "1" * 30)
    with pytest.raises(DatasetError, match="over 20 characters"):
        pack(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_more_labels_than_there_may_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltyard.datasets.MAX_CLASSES", 60)
    np.savez(tmp_path / "a.npz", x=BYTES, y=np.arange(ROWS))
    with pytest.raises(DatasetError, match="over 60 different labels"):
        pack(tmp_path / "a.npz", tmp_path / "out")
    with pytest.raises(DatasetError, match="labels take over"):
        write_dataset(tmp_path / "out", BYTES, np.zeros(ROWS, int), labels=["x" * (16 << 20)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


DIES = """
import os, signal, sys
from pathlib import Path
import numpy as np
from tiltyard import datasets

moment, folder = sys.argv[1], Path(sys.argv[2])
good = datasets.read_batches
def then_dies(parts, count):
    for number, part in enumerate(parts):
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        yield part

if moment == "reading":
    datasets.read_batches = lambda source, scratch: then_dies(good(source, scratch=scratch), 3)
else:
    chunks = datasets.Spill.chunks
    # The first pass over the labels finds the classes; a later one is written.
    datasets.Spill.chunks = lambda self: then_dies(chunks(self), 3 if self.row_shape else 100)
from tiltyard.datasources import rows
rows.BATCH_ROWS = 7
datasets.pack(folder / "a.npz", folder / "out")
"""


@pytest.mark.parametrize("moment", ["reading", "writing"])
def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path, moment: str) -> None:
    np.savez(tmp_path / "a.npz", x=BYTES, y=LABELS["integers"])
    died = subprocess.run([sys.executable, "-c", DIES, moment, tmp_path])
    assert died.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("nameless", [True, False])
def test_a_failure_while_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    if not nameless:
        monkeypatch.delattr("os.O_TMPFILE")
    write_dataset(tmp_path / "out", BYTES, LABELS["targets"])
    before = (tmp_path / "out").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_dataset(tmp_path / "out", BYTES + 1, LABELS["targets"])
    assert (tmp_path / "out").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write_dataset(tmp_path / "out", BYTES + 1, LABELS["targets"])
    assert Dataset.open(tmp_path / "out").x[0, 0] == BYTES[0, 0] + 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
