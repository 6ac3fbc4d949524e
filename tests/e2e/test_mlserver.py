"""MLServer from PyPI, in an environment of its own, as the validator's model server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmarks._mlserver import mlserver, template
from benchmarks._peers import PeerUnavailable
from services.validator.assignments import Order
from services.validator.endpoints import EndpointAttempts
from services.validator.evaluation import Job
from services.validator.fleet import ModelServer
from services.validator.runs import Progress
from tiltyard.counting import Tally
from tiltyard.identity import Key
from tiltyard.models import build, save_weights
from tiltyard.modelspec import Mlp, ModelSpec

SPEC = ModelSpec((8, 8), 10, Mlp((32,)), input_scale=1 / 255)


# Its first run makes the environment.
@pytest.mark.timeout(900)
async def test_mlserver_evaluates_as_torch_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (10_000, 8, 8), dtype=np.uint8), rng.integers(0, 10, 10_000)
    save_file({"x": x, "y": y}, tmp_path / "dataset")
    network = build(SPEC, seed=0).eval()
    save_weights(network, tmp_path / "submitted")
    order = Order(
        dataset_digest="",
        dataset_bytes=0,
        model_digest="ab" * 32,
        model_bytes=0,
        spec=SPEC,
        max_cpu_s=60,
        max_memory_bytes=1 << 30,
    )
    share = tmp_path / "models"
    share.mkdir()
    try:
        with mlserver(share) as address:
            attempts = EndpointAttempts(
                [ModelServer("mlserver", address)],
                share=share,
                template=template(tmp_path / "template"),
                key=Key.generate(),
                concurrency=1,
            )
            found = await attempts.attempt(Job(order, tmp_path / "dataset", tmp_path / "submitted"), Progress())
            attempts.close()
    except PeerUnavailable as error:
        pytest.skip(f"MLServer cannot be installed here: {error}")
    tally = Tally()
    with torch.inference_mode():
        tally.add(network(torch.from_numpy(x)).numpy(), y)
    assert found.counts is not None
    assert (found.counts.correct, found.counts.total) == (tally.counts().correct, len(y))
    assert found.prediction_blocks == tally.prediction_blocks()
    assert list(share.glob("*tiltyard-*")) == []
