"""A real MLServer as a process, on free ports, with a folder of models that clients load by name."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from benchmarks import _peers
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 90
# What a validator's TILTYARD_MODEL_TEMPLATE holds for MLServer.
MODEL_SETTINGS = {
    "name": "${MODEL}",
    "implementation": "benchmarks._mlserver_runtime.TiltyardModel",
    "parameters": {"uri": "./"},
}


@contextmanager
def mlserver(folder: Path) -> Iterator[str]:
    """The address of a server that loads models from `folder`. Raises _peers.PeerUnavailable."""
    python = _peers.python_of(_peers.MLSERVER, ours_too=True)
    http, port, metrics = _free_ports(3)
    settings = {
        "host": "127.0.0.1",
        "http_port": http,
        "grpc_port": port,
        "metrics_port": metrics,
        "metrics_endpoint": None,
        "parallel_workers": 0,
        "load_models_at_startup": False,
        "grpc_max_message_length": 16 << 20,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    process = subprocess.Popen(
        [str(python.with_name("mlserver")), "start", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    address = f"127.0.0.1:{port}"
    try:
        with grpc.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 500)]) as channel:
            grpc.channel_ready_future(channel).result(timeout=START_TIMEOUT_S)
            rpc.GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest(), timeout=START_TIMEOUT_S)
        yield address
    except grpc.FutureTimeoutError:
        process.kill()
        raise _peers.PeerUnavailable(process.communicate()[0].decode()[-500:]) from None
    finally:
        process.terminate()
        process.communicate()


def template(folder: Path) -> Path:
    """A template folder for the validator's settings, made in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model-settings.json").write_text(json.dumps(MODEL_SETTINGS))
    return folder


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
