"""Progress, batch sizes, and the confirmation of faults."""

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from services.validator.assignments import Order
from services.validator.batches import MAX_TENSOR_BYTES, rows_per_batch
from services.validator.convert import RunPages
from services.validator.evaluation import CannotEvaluate, Job, ModelFailed, ServerLost, find
from services.validator.rows import EvaluationRows
from services.validator.runs import Fault, Finding, Progress, Run, RunState, view
from services.validator.validation import RunPage
from tiltyard.counting import Counts
from tiltyard.modelspec import Convnet, Linear, Mlp, ModelSpec, tensor_shapes
from tiltyard.validator.v1 import validator_pb2 as pb

SPEC = ModelSpec((4,), 2, Linear())
GOOD = Finding(counts=Counts(1, 2, 0, 3))


def test_progress_tells_rate_and_time_left():
    now = iter([0.0, 1.0, 2.0])
    progress = Progress(timer=lambda: next(now))
    assert progress.samples_per_second() == progress.eta_s() == 0.0
    progress.begin(400)
    progress.advance(100)
    progress.advance(200)
    assert (progress.position, progress.samples_per_second(), progress.eta_s()) == (200, 100.0, 2.0)


@pytest.mark.parametrize(
    ("spec", "row_bytes", "expected"),
    [
        (ModelSpec((784,), 10, Mlp((128,))), 784, 2674),
        (SPEC, 4, 4096),
        (ModelSpec((3, 2048, 2048), 2, Linear()), 12_582_912, 1),
        (ModelSpec((64,), 65_536, Linear()), 64, 8),
        # 64 channels of 224 x 224 float32 values are 12.8 MB a row.
        (ModelSpec((3, 224, 224), 10, Convnet((64,))), 150_528, 5),
    ],
)
def test_a_batch_is_bounded_by_bytes_both_ways_and_by_the_widest_layer(spec, row_bytes, expected):
    assert rows_per_batch(spec, row_bytes) == expected


def test_a_row_over_the_message_limit_is_nobodys_fault():
    with pytest.raises(CannotEvaluate, match="message limit"):
        rows_per_batch(SPEC, MAX_TENSOR_BYTES + 1)


class ScriptedAttempts:
    def __init__(self, *outcomes):
        self._outcomes = list(outcomes)
        self.one_core = []

    async def attempt(self, job, progress):
        self.one_core.append(job.one_core)
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    @property
    def left(self):
        return len(self._outcomes)


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(SPEC).items()}, path)
    order = Order("", 0, "", 0, SPEC, max_cpu_s=1, max_memory_bytes=1)
    return Job(order, dataset=Path("unused"), model=path)


CRASH = ModelFailed(Fault.CRASHED, "exited with status 3")
LOST = ServerLost("killed from outside")


@pytest.mark.parametrize(
    ("outcomes", "finding"),
    [
        ([GOOD], GOOD),
        ([CRASH, GOOD], GOOD),
        ([CRASH, CRASH], Finding(fault=Fault.CRASHED, detail="exited with status 3")),
        ([CRASH, LOST, LOST, GOOD], GOOD),
        ([LOST, CRASH, ModelFailed(Fault.TOO_SLOW, "slow")], Finding(fault=Fault.TOO_SLOW, detail="slow")),
    ],
)
async def test_a_fault_is_confirmed_once(job, outcomes, finding):
    attempts = ScriptedAttempts(*outcomes)
    assert await find(job, attempts, Progress()) == finding
    assert attempts.left == 0


@pytest.mark.parametrize("fault", Fault)
async def test_what_many_cores_may_have_brought_about_is_confirmed_on_one(job, fault):
    attempts = ScriptedAttempts(ModelFailed(fault, ""), LOST, GOOD)
    assert await find(job, attempts, Progress()) == GOOD
    once_more = fault in (Fault.OUT_OF_MEMORY, Fault.CRASHED)
    assert attempts.one_core == [False, once_more, once_more]


async def test_servers_that_keep_dying_are_the_platforms_trouble(job):
    with pytest.raises(CannotEvaluate, match="killed from outside"):
        await find(job, ScriptedAttempts(LOST, LOST, LOST), Progress())


async def test_a_bad_structure_needs_no_server(job):
    job.model.write_bytes(job.model.read_bytes()[:-1])
    assert (await find(job, ScriptedAttempts(), Progress())).fault is Fault.BAD_FORMAT
    save_file({"head.weight": np.zeros((2, 4), np.float32)}, job.model)
    assert (await find(job, ScriptedAttempts(), Progress())).fault is Fault.SHAPE_MISMATCH


def test_rows_are_read_as_they_lie_in_the_file(tmp_path):
    x, y = np.arange(60, dtype=np.uint8).reshape(5, 3, 4), np.arange(5)
    save_file({"x": x, "y": y}, tmp_path / "d")
    with EvaluationRows.open(tmp_path / "d") as rows:
        assert (rows.total, rows.row_shape, rows.row_bytes, rows.datatype) == (5, (3, 4), 12, "UINT8")
        assert rows.features(1, 3) == x[1:3].tobytes()
        assert rows.labels(2, 5).tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"x": np.zeros((2, 3), np.uint8)}, "lacks x or y"),
        ({"x": np.zeros((2, 3), np.uint8), "y": np.zeros(3, np.int64)}, "are no dataset"),
        ({"x": np.zeros((0, 3), np.uint8), "y": np.zeros(0, np.int64)}, "are no dataset"),
        ({"x": np.zeros((2, 3), np.uint8), "y": np.full(2, math.pi, np.float64)}, "labels are F64"),
        ({"x": np.zeros((2, 3), np.uint64), "y": np.zeros(2, np.int64)}, "features are U64"),
    ],
)
def test_what_is_no_dataset_is_said(tmp_path, tensors, problem):
    save_file(tensors, tmp_path / "d")
    with pytest.raises(CannotEvaluate, match=problem):
        EvaluationRows.open(tmp_path / "d")


def test_a_page_of_long_details_goes_into_one_message_and_the_next_one_begins_after_it():
    name = f"tasks/t/submissions/1/assignments/1-{'a' * 40}"
    long = Run(name, "t", RunState.FAILED, datetime(2030, 1, 1, tzinfo=UTC), detail="d" * 300_000)
    runs = tuple(view(replace(long, number=number)) for number in range(9, 0, -1))
    pages = RunPages(bytes(32))
    first = pages.response(RunPage(runs, next_below=None))
    assert len(first.runs) == 6
    assert pages.below(pb.ListEvaluationRunsRequest(page_token=first.next_page_token)) == 4
    last = pages.response(RunPage(runs[6:], next_below=None))
    assert (len(last.runs), last.next_page_token) == (3, "")
