"""Batches of many callers: joined where they wait, within a bound, and never run for somebody who has gone."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from services.modelserver.batching import BatchQueue
from services.modelserver.loading import LoadedModel
from services.modelserver.running import Batch, Logits, joint_rows, run_batches
from services.runtime.errors import FailedPrecondition, ResourceExhausted
from tiltyard.models import build
from tiltyard.models.onnxmodel import OnnxNetwork
from tiltyard.modelspec import Linear, Mlp, ModelSpec

SPEC = ModelSpec((4,), 2, Mlp((8,)))
NETWORK = build(SPEC, seed=0).eval()
MODEL = LoadedModel(SPEC, NETWORK, 0)
OTHER = LoadedModel(SPEC, NETWORK, 0)
PATIENCE_S = 20.0


def batch(rows: int, *, seed: int = 0, datatype: str = "FP32") -> Batch:
    values = np.random.default_rng(seed).normal(size=(rows, 4)).astype({"FP32": "<f4", "FP64": "<f8"}[datatype])
    return Batch(datatype, (rows, 4), values.tobytes())


class Gate:
    """Runs batches for real, but only when it is open; remembers the rows of each batch of each run."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.begun, self.open = threading.Event(), threading.Event()
        self.refused: int | None = None

    def __call__(self, model: LoadedModel, batches: Sequence[Batch]) -> list[Logits]:
        self.runs.append([each.shape[0] for each in batches])
        self.begun.set()
        assert self.open.wait(PATIENCE_S)
        if self.refused in self.runs[-1]:
            raise FailedPrecondition("MODEL_FAILED", "these rows are refused")
        return run_batches(model, batches)


@pytest.fixture
def gate() -> Gate:
    return Gate()


async def begun(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.begun.wait, PATIENCE_S)


async def test_small_batches_that_wait_run_as_one_and_each_gets_its_own_rows(gate: Gate) -> None:
    queue = BatchQueue(gate, max_bytes=1 << 20)
    waiting = [asyncio.ensure_future(queue.answer(MODEL, batch(rows, seed=rows))) for rows in (1, 2, 3)]
    first, *_ = waiting
    await begun(gate)
    # These come while the thread is busy.
    waiting += [asyncio.ensure_future(queue.answer(MODEL, batch(rows, seed=rows))) for rows in (4, 5, 6)]
    await asyncio.sleep(0)
    gate.open.set()
    answers = await asyncio.gather(*waiting)
    assert first.done()
    assert gate.runs == [[1, 2, 3], [4, 5, 6]]
    for rows, answer in zip((1, 2, 3, 4, 5, 6), answers, strict=True):
        with torch.inference_mode():
            alone = NETWORK(torch.frombuffer(bytearray(batch(rows, seed=rows).data), dtype=torch.float32).view(-1, 4))
        assert answer.shape == (rows, 2)
        np.testing.assert_allclose(np.frombuffer(answer.data, "<f4").reshape(-1, 2), alone.numpy(), rtol=1e-5)
    queue.close()


async def test_only_what_is_small_and_alike_is_joined_and_the_oldest_is_never_passed_over(gate: Gate) -> None:
    most = joint_rows(MODEL)
    queue = BatchQueue(gate, max_bytes=1 << 30)
    asked = [
        (MODEL, batch(1)),
        (MODEL, batch(most)),  # large enough to run alone
        (OTHER, batch(2)),
        (MODEL, batch(3)),
        (OTHER, batch(4)),
        (MODEL, batch(5, datatype="FP64")),
        (MODEL, batch(most - 4)),  # no more room beside the three rows
    ]
    waiting = [asyncio.ensure_future(queue.answer(MODEL, batch(7)))]
    await begun(gate)
    waiting += [asyncio.ensure_future(queue.answer(model, each)) for model, each in asked]
    await asyncio.sleep(0)
    gate.open.set()
    await asyncio.gather(*waiting)
    assert gate.runs == [[7], [1, 3, most - 4], [most], [2, 4], [5]]
    queue.close()


def test_a_graph_of_somebody_elses_making_runs_alone() -> None:
    class Session:
        def get_inputs(self) -> list[object]:
            return [type("Input", (), {"name": "x"})()]

    assert joint_rows(LoadedModel(SPEC, OnnxNetwork(SPEC, Session()), 0)) == 0
    assert joint_rows(LoadedModel(ModelSpec((1024, 1024), 2, Linear()), NETWORK, 0)) == 64


async def test_a_full_queue_refuses_with_the_time_to_wait_and_takes_again_when_it_is_not(gate: Gate) -> None:
    one = 4096 + len(batch(8).data)
    queue = BatchQueue(gate, max_bytes=3 * one)
    held = [asyncio.ensure_future(queue.answer(MODEL, batch(8))) for _ in range(3)]
    await begun(gate)
    with pytest.raises(ResourceExhausted) as caught:
        await queue.answer(MODEL, batch(8))
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    gate.open.set()
    await asyncio.gather(*held)
    # Nobody is there: one that alone is over the bound delays nobody.
    assert (await queue.answer(MODEL, batch(100_000))).shape == (100_000, 2)
    queue.close()


async def test_who_stops_waiting_leaves_the_queue_and_its_rows_never_run(gate: Gate) -> None:
    one = 4096 + len(batch(1).data)
    queue = BatchQueue(gate, max_bytes=2 * one)
    first = asyncio.ensure_future(queue.answer(MODEL, batch(1)))
    await begun(gate)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await queue.answer(MODEL, batch(1))
    second = asyncio.ensure_future(queue.answer(MODEL, batch(1)))
    await asyncio.sleep(0)
    gate.open.set()
    await asyncio.gather(first, second)
    assert gate.runs == [[1], [1]]
    queue.close()


async def test_nobody_pays_for_the_rows_of_another(gate: Gate) -> None:
    gate.refused = 2
    gate.open.set()
    queue = BatchQueue(gate, max_bytes=1 << 20)
    one, two, three = await asyncio.gather(
        *(queue.answer(MODEL, batch(rows)) for rows in (1, 2, 3)), return_exceptions=True
    )
    assert isinstance(two, FailedPrecondition)
    assert [each.shape[0] for each in (one, three) if isinstance(each, Logits)] == [1, 3]
    queue.close()


async def test_a_batch_waits_for_others_no_longer_than_the_delay(gate: Gate) -> None:
    gate.open.set()
    loop = asyncio.get_running_loop()
    queue = BatchQueue(gate, max_bytes=1 << 20, delay_s=0.1)
    began = loop.time()
    early = asyncio.ensure_future(queue.answer(MODEL, batch(1)))
    await asyncio.sleep(0.01)
    await asyncio.gather(early, queue.answer(MODEL, batch(2)))
    assert gate.runs == [[1, 2]]
    assert loop.time() - began >= 0.1
    queue.close()
    # Who fills a batch waits for nobody.
    patient = BatchQueue(gate, max_bytes=1 << 30, delay_s=2 * PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        await patient.answer(MODEL, batch(joint_rows(MODEL)))
    patient.close()
