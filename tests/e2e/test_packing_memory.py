"""Packing a source, and looking through a dataset, take the memory of some batches, in a process of their own."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.trainer.datareport import DataReport
from tiltyard.datasets import Dataset, write_dataset

# What the values of a source take, and what packing them may add to the process.
SOURCE_MIB = 128
ALLOWED_MIB = 32
COLUMNS = 48
BLOCK_ROWS = 4096
BLOCKS = SOURCE_MIB * 1024 * 1024 // (8 * COLUMNS * BLOCK_ROWS)

# Something small of the same kind goes first, so that what is imported is not counted.
LIMIT = """
import resource, sys
from pathlib import Path

def allow(more):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    resource.setrlimit(resource.RLIMIT_DATA, (int(line.split()[1]) * 1024 + more, resource.RLIM_INFINITY))

small, large, out, allowed = *map(Path, sys.argv[1:4]), int(sys.argv[4])
"""
PACK = """
from tiltyard.datasets import pack
pack(small, out)
allow(allowed)
pack(large, out)
"""
REPORT = """
import json
from services.trainer.datareport import report_on
from tiltyard.datasets import Dataset
report_on(Dataset.open(small), classes=7, scratch=out)
allow(allowed)
print(json.dumps(report_on(Dataset.open(large), classes=7, scratch=out).to_json()))
"""
# Pools that keep memory for later would leave some of the large source room.
PLAIN = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}


def values() -> np.ndarray:
    """Rows that no dtype but a float holds, with the column of labels at their end."""
    x = np.random.default_rng(0).integers(0, 1000, (BLOCK_ROWS, COLUMNS)) / 8
    x[:, -1] = np.arange(BLOCK_ROWS) % 7
    return x


def csv(path: Path, blocks: int) -> None:
    block = "".join(f"{','.join(map(str, row[:-1]))},{int(row[-1])}\n" for row in values().tolist())
    with path.open("w") as file:
        for _ in range(blocks):
            file.write(block)


def npz(path: Path, blocks: int) -> None:
    x, y = values()[:, :-1], values()[:, -1].astype(np.int64)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, block in (("x", x), ("y", y)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = np.lib.format.header_data_from_array_1_0(block)
                shape = (blocks * BLOCK_ROWS, *block.shape[1:])
                np.lib.format.write_array_header_1_0(file, header | {"shape": shape, "fortran_order": False})
                for _ in range(blocks):
                    file.write(block.tobytes())


def by_columns(path: Path, blocks: int) -> None:
    """As pandas writes them: the rows are scattered over the file."""
    x, y = values()[:, :-1], values()[:, -1].astype(np.int64)
    np.savez(path, x=np.asfortranarray(np.tile(x, (blocks, 1))), y=np.tile(y, blocks))


def table(blocks: int) -> Any:
    arrow = pytest.importorskip("pyarrow")
    rows = values()
    columns = {f"c{index}": rows[:, index] for index in range(COLUMNS - 1)} | {"y": rows[:, -1].astype(np.int64)}
    return arrow.concat_tables([arrow.table(columns)] * blocks)


def parquet(path: Path, blocks: int) -> None:
    """One row group, the most that a reader of whole row groups would have to hold."""
    files = pytest.importorskip("pyarrow.parquet")
    files.write_table(table(blocks), path, row_group_size=blocks * BLOCK_ROWS, use_dictionary=False)


def hugging_face(path: Path, blocks: int) -> None:
    """One record batch in one file, the most that a reader of whole record batches would have to hold."""
    arrow = pytest.importorskip("pyarrow")
    path.mkdir()
    whole = table(blocks).combine_chunks()
    with arrow.OSFile(str(path / "data.arrow"), "wb") as file, arrow.ipc.new_stream(file, whole.schema) as writer:
        writer.write_table(whole)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))


def run(what: str, *paths: Path) -> str:
    command = [sys.executable, "-c", LIMIT + what, *paths, str(ALLOWED_MIB * 1024 * 1024)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | PLAIN)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.csv", csv),
        ("compressed.npz", npz),
        ("by-columns.npz", by_columns),
        ("a.parquet", parquet),
        ("huggingface", hugging_face),
    ],
)
def test_a_source_several_times_larger_than_its_share_of_memory_is_packed(
    tmp_path: Path, name: str, write: Callable[[Path, int], None]
) -> None:
    (tmp_path / "small").mkdir()
    small, large, out = tmp_path / "small" / name, tmp_path / name, tmp_path / "out.safetensors"
    write(small, 2)
    write(large, BLOCKS)
    run(PACK, small, large, out)
    dataset = Dataset.open(out)
    expected = values()
    assert dataset.x.shape == (BLOCKS * BLOCK_ROWS, COLUMNS - 1)
    for start, part in dataset.chunks("x"):
        index = np.arange(start, start + len(part)) % BLOCK_ROWS
        assert np.array_equal(part, expected[index, :-1].astype(np.float32)), start
    assert np.array_equal(dataset.y, np.arange(len(dataset)) % BLOCK_ROWS % 7)
    assert {path.name for path in tmp_path.iterdir()} == {"small", name, out.name}


def test_a_dataset_of_long_rows_is_looked_through(tmp_path: Path) -> None:
    """Of a row there is no more than the row itself in memory, and a piece of it."""
    x = np.random.default_rng(0).standard_normal((6, 1 << 20), np.float32)
    x[4], x[5] = x[1], x[2]
    x[5, 1 << 19] = np.inf
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    write_dataset(small, x[:, :100], np.arange(6))
    write_dataset(large, x, np.arange(6))
    report = DataReport.from_json(json.loads(run(REPORT, small, large, tmp_path)))
    assert (report.duplicate_rows, report.contradicting_rows, report.not_finite_rows) == (1, 1, 1)
    finite = x[np.isfinite(x)]
    assert (report.minimum, report.maximum) == (float(finite.min()), float(finite.max()))
    assert report.mean == pytest.approx(float(finite.mean(dtype=np.float64)))


def test_a_dataset_of_many_small_rows_is_looked_through(tmp_path: Path) -> None:
    """What is known of a row may take more room than the row."""
    rows = 3_000_000
    x = np.arange(rows, dtype=np.uint32).view(np.uint8).reshape(rows, 4)
    y = np.arange(rows) % 7
    x[rows // 2 :: 1000] = x[0]
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    write_dataset(small, x[:1000], y[:1000])
    write_dataset(large, x, y)
    report = DataReport.from_json(json.loads(run(REPORT, small, large, tmp_path)))
    repeats = np.arange(rows // 2, rows, 1000)
    assert report.class_rows == tuple(np.bincount(y).tolist())
    assert (report.duplicate_rows, report.contradicting_rows) == (len(repeats), int((repeats % 7 != 0).sum()))
    assert {path.name for path in tmp_path.iterdir()} == {small.name, large.name}
