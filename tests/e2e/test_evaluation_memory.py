"""A validator's own memory: the same for a dataset of any size, and after any number of evaluations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1024 * 1024
SIDE = 1024

# A process of its own, whose peak is its own. Arguments: folder, rows, evaluations.
EVALUATIONS = """
import asyncio, json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from services.modelserver.spawn import Nursery
from services.validator.assignments import Order
from services.validator.children import NurseryAttempts
from services.validator.evaluation import Job
from services.validator.runs import Progress
from tiltyard.modelspec import Linear, ModelSpec, tensor_shapes

folder, rows, evaluations = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
spec = ModelSpec((SIDE, SIDE), 2, Linear(), input_scale=1 / 255)
save_file({n: np.ones(s, np.float32) for n, s in tensor_shapes(spec).items()}, folder / "model")
order = Order(dataset_digest="", dataset_bytes=0, model_digest="", model_bytes=0, spec=spec, max_cpu_s=3600,
              max_memory_bytes=1 << 30)

def memory(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

async def main():
    resident = []
    async with Nursery() as nursery:
        attempts = NurseryAttempts(nursery, folder=folder / "children", threads=0, concurrency=1)
        for _ in range(evaluations):
            found = await attempts.attempt(Job(order, folder / "dataset", folder / "model"), Progress())
            assert (found.counts.correct, found.counts.total) == (rows, rows)
            resident.append(memory("VmRSS"))
        attempts.close()
    print(json.dumps({"peak": memory("VmHWM"), "resident": resident}))

asyncio.run(main())
""".replace("SIDE", str(SIDE))


def sparse_dataset(path: Path, rows: int) -> int:
    """A dataset of zeros, of `rows` MiB by its size and of next to nothing on the disk; its size in bytes."""
    features, labels = rows * SIDE * SIDE, rows * 8
    header = json.dumps(
        {
            "x": {"dtype": "U8", "shape": [rows, SIDE, SIDE], "data_offsets": [0, features]},
            "y": {"dtype": "I64", "shape": [rows], "data_offsets": [features, features + labels]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + features + labels)
    return path.stat().st_size


def evaluate(folder: Path, rows: int, evaluations: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", EVALUATIONS, str(folder), str(rows), str(evaluations)],
        # glibc opens another heap whenever two threads collide: on a busy machine not only at the beginning.
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("rows", "peak_mib"), [(600, 300), pytest.param(10_240, 500, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
def test_a_dataset_larger_than_memory_is_no_burden(tmp_path: Path, rows: int, peak_mib: int) -> None:
    assert sparse_dataset(tmp_path / "dataset", rows) > rows * MIB > peak_mib * MIB
    assert evaluate(tmp_path, rows, 1)["peak"] < peak_mib * MIB


@pytest.mark.parametrize("evaluations", [150, pytest.param(1000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
def test_memory_does_not_grow_with_the_number_of_evaluations(tmp_path: Path, evaluations: int) -> None:
    sparse_dataset(tmp_path / "dataset", 8)
    resident = evaluate(tmp_path, 8, evaluations)["resident"]
    # The first ones fill what is kept for the next: thread stacks, the allocator's arenas; messages are 1 MiB each.
    assert max(resident[-10:]) - max(resident[:100]) <= 16 * MIB
