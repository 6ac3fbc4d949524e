"""The standalone model server as a process: behind a token on TCP, behind a closed folder on a Unix socket."""

from __future__ import annotations  # the stubs' asynchronous types exist for the type checker only

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from tiltyard.identity import Key, issue_token
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc
from tiltyard.models import build, save_weights
from tiltyard.modelspec import Mlp, ModelSpec, to_json

SPEC = ModelSpec((6,), 3, Mlp((4,)))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("good", "bad"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(json.dumps(to_json(SPEC)))
        save_weights(build(SPEC, seed=0), folder / "model.safetensors")
    (tmp_path / "models" / "bad" / "model.safetensors").write_bytes(b"nonsense")
    return tmp_path / "models"


def environment(tmp_path: Path, listen: str, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TILTYARD_")}
    return {
        **inherited,
        "TILTYARD_LISTEN": listen,
        "TILTYARD_STATE_DIR": str(tmp_path / "state"),
        "TILTYARD_MODEL_REPOSITORY": str(tmp_path / "models"),
        "TILTYARD_THREADS": "1",
        **more,
    }


@contextmanager
def served(settings: dict[str, str], address: str) -> Iterator[grpc.Channel]:
    """A server process and a channel to it; at the end it must drain and exit with 0."""
    process = subprocess.Popen([sys.executable, "-m", "services.modelserver"], env=settings)
    try:
        with grpc.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 200)]) as channel:
            grpc.channel_ready_future(channel).result(60)
            yield channel
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def infer(channel: grpc.Channel, *, token: str | None = None) -> pb.ModelInferResponse:
    request = pb.ModelInferRequest(model_name="good", raw_input_contents=[np.ones((2, 6), np.uint8).tobytes()])
    request.inputs.add(name="x", datatype="UINT8", shape=[2, 6])
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    return rpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30, metadata=metadata)


def test_on_tcp_it_obeys_its_own_key_and_its_operators(repository: Path, tmp_path: Path) -> None:
    own, operator, stranger = Key.load_or_create(tmp_path / "key.pem"), Key.generate(), Key.generate()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = environment(
        tmp_path, address, TILTYARD_OPERATORS=operator.id, TILTYARD_KEY_FILE=str(tmp_path / "key.pem")
    )
    with served(settings, address) as channel:
        for key in (own, operator):
            assert list(infer(channel, token=issue_token(key, audience=own.id)).outputs[0].shape) == [2, 3]
        for token, code in (
            (None, grpc.StatusCode.UNAUTHENTICATED),
            (issue_token(operator, audience=operator.id), grpc.StatusCode.UNAUTHENTICATED),
            (issue_token(stranger, audience=own.id), grpc.StatusCode.PERMISSION_DENIED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                infer(channel, token=token)
            assert caught.value.code() is code  # type: ignore[attr-defined]


def test_on_a_unix_socket_in_a_closed_folder_it_asks_for_no_token(repository: Path, tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'closed' / 's'}"
    with served(environment(tmp_path, address), address) as channel:
        assert (tmp_path / "closed").stat().st_mode & 0o077 == 0
        assert list(infer(channel).outputs[0].shape) == [2, 3]
        index = rpc.GRPCInferenceServiceStub(channel).RepositoryIndex(pb.RepositoryIndexRequest())
        assert [(entry.name, entry.state) for entry in index.models] == [("bad", "UNAVAILABLE"), ("good", "READY")]
        assert "BAD_FORMAT" in index.models[0].reason


def test_a_socket_in_an_open_folder_is_refused(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "services.modelserver"],
        env=environment(tmp_path, f"unix:{folder / 's'}"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "TILTYARD_LISTEN" in done.stderr
