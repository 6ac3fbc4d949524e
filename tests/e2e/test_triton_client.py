"""Triton's own client, in an environment of its own, against our model server: every call that it has for us."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks._peers import TRITON, PeerUnavailable, python_of
from services.modelserver.models import Models
from services.modelserver.running import MAX_MESSAGE_BYTES
from services.modelserver.servicer import mounts
from services.runtime.server import ArenaServer
from tiltyard.models import build, save_weights
from tiltyard.modelspec import Mlp, ModelSpec, to_json

SPEC = ModelSpec((8, 8), 10, Mlp((32,)), input_scale=1 / 255)

CLIENT = """
import json, queue, sys
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

client = triton.InferenceServerClient(sys.argv[1])
x = np.load(sys.argv[2])
wanted = triton.InferInput("x", x.shape, "UINT8")
wanted.set_data_from_numpy(x)
found = {"live": client.is_server_live(), "ready": client.is_server_ready()}
found["before"] = client.is_model_ready("m")
client.load_model("m")
found["after"] = client.is_model_ready("m")
found["server"] = client.get_server_metadata().name
metadata = client.get_model_metadata("m")
found["input"] = [metadata.inputs[0].name, metadata.inputs[0].datatype, list(metadata.inputs[0].shape)]
found["index"] = [[model.name, model.state] for model in client.get_model_repository_index().models]
answers = [client.infer("m", [wanted], request_id="7")]
pending = queue.Queue()
client.async_infer("m", [wanted], lambda result, error: pending.put((result, error)))
answers.append(pending.get(timeout=60)[0])
client.start_stream(callback=lambda result, error: pending.put((result, error)))
for number in range(5):
    client.async_stream_infer("m", [wanted], request_id=str(number))
streamed = [pending.get(timeout=60) for _ in range(5)]
wrong = triton.InferInput("x", [1, 3], "UINT8")
wrong.set_data_from_numpy(np.zeros((1, 3), np.uint8))
client.async_stream_infer("m", [wrong])
found["refused"] = str(pending.get(timeout=60)[1])
client.stop_stream()
found["order"] = [result.get_response().id for result, _ in streamed]
answers += [result for result, _ in streamed]
logits = [answer.as_numpy("logits") for answer in answers]
found["alike"] = all(np.array_equal(logits[0], other) for other in logits)
client.unload_model("m")
found["unloaded"] = client.is_model_ready("m")
try:
    client.infer("m", [wanted])
except InferenceServerException as error:
    found["gone"] = error.status()
np.save(sys.argv[3], logits[0])
print(json.dumps(found))
"""


# Its first run makes the environment.
@pytest.mark.timeout(900)
async def test_tritonclient_drives_our_model_server(tmp_path: Path) -> None:
    try:
        python = python_of(TRITON)
    except PeerUnavailable as error:
        pytest.skip(f"tritonclient cannot be installed here: {error}")
    folder = tmp_path / "models" / "m"
    folder.mkdir(parents=True)
    network = build(SPEC, seed=0).eval()
    (folder / "spec.json").write_text(json.dumps(to_json(SPEC)))
    save_weights(network, folder / "model.safetensors")
    x = np.random.default_rng(0).integers(0, 256, (500, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    models = Models(repository=tmp_path / "models", threads=1)
    async with ArenaServer(
        "127.0.0.1:0", mounts(models), authenticator=None, max_message_bytes=MAX_MESSAGE_BYTES
    ) as server:
        found = json.loads(await _run(python, server.address, tmp_path))
    models.close()
    assert found == {
        "live": True,
        "ready": True,
        "before": False,
        "after": True,
        "server": "tiltyard",
        "input": ["x", "FP32", [-1, 8, 8]],
        "index": [["m", "READY"]],
        "refused": found["refused"],
        "order": ["0", "1", "2", "3", "4"],
        "alike": True,
        "unloaded": False,
        "gone": "StatusCode.NOT_FOUND",
    }
    assert "inputs[0].shape" in found["refused"]
    with torch.inference_mode():
        assert np.array_equal(np.load(tmp_path / "y.npy"), network(torch.from_numpy(x)).numpy())


async def _run(python: Path, address: str, folder: Path) -> str:

    command = [str(python), "-c", CLIENT, address, str(folder / "x.npy"), str(folder / "y.npy")]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
