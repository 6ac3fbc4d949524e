"""Upload and download of a model through the registry, beside one raw gRPC stream with SHA-256 on both ends.

The registry is `python -m services.registry` on a disk, beside a real selector; the raw server keeps no byte. One
client process asks both in turns, over Unix sockets, and both ends of both hash all bytes.
TILTYARD_BENCH_TRANSFER_MB sets the size of the model, 1 GB unless told. Its time is that of the whole call: for an
upload that is the digest of the file, the question where to begin, the bytes, and the answer that it is on record.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import grpc

from benchmarks._commits import ORIGIN, serving_registry
from tiltyard.client import Client
from tiltyard.identity import Key
from tiltyard.registry.v1 import participant_pb2
from tiltyard.selector.v1 import stake_pb2
from tiltyard.transfers import CHUNK_BYTES, download, upload

_MB = 1 << 20
_ROUNDS = 5
_GOAL = 0.7
_STAKE = 100_000_000
_FIRST_FILES, _FIRST_MB = 2, 128
# Grown by more than this while a model of eight times the size passes, a process would hold a part that grows with it.
_FLAT_MB = 64
_UP, _DOWN = "/benchmark.v1.Raw/Up", "/benchmark.v1.Raw/Down"
_BLOCK = bytes(range(256)) * (CHUNK_BYTES // 256)


def run() -> list[dict[str, Any]]:
    """Both directions, and the memory of both processes."""
    size_mb = int(os.environ.get("TILTYARD_BENCH_TRANSFER_MB", "1024"))
    with tempfile.TemporaryDirectory() as name, ExitStack() as processes:
        folder = Path(name)
        raw = processes.enter_context(_serving_raw(folder))
        registry = processes.enter_context(serving_registry(folder))
        command = [sys.executable, "-m", __name__, "client", registry, raw, str(folder), str(size_mb)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return list(_lines(json.loads(done.stdout), size_mb))


def _lines(measured: dict[str, list[list[float]]], size_mb: int) -> Iterator[dict[str, Any]]:
    for direction in ("upload", "download"):
        rounds = measured[direction]
        rates = [median(size_mb / seconds for seconds in column) for column in zip(*rounds, strict=True)]
        ours, hashed, bare = rates
        for name, theirs, goal in (("with SHA-256 on both ends", hashed, _GOAL), ("without", bare, None)):
            column = 1 if goal else 2
            yield {
                "name": f"{direction} of {size_mb} MB",
                "ours": ours,
                "unit": "MB/s",
                "against": f"one raw gRPC stream {name}",
                "theirs": theirs,
                "ratio": median(round_[column] / round_[0] for round_ in rounds),
                "goal": goal,
            }
    for process in ("registry", "client"):
        grown = max(max(measured[f"{process} grown"][0]), 1.0)
        yield {
            "name": f"most memory that {size_mb} MB up and down add to the {process}",
            "ours": grown,
            "unit": "MB",
            "against": "what is flat",
            "theirs": _FLAT_MB,
            "ratio": _FLAT_MB / grown,
            "goal": 1.0,
        }


@contextmanager
def _serving_raw(folder: Path) -> Iterator[str]:
    address = f"unix:{folder / 'raw'}.sock"
    process = subprocess.Popen([sys.executable, "-m", __name__, "serve", address])
    try:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
        yield address
    finally:
        process.kill()
        process.wait()


async def _serve_raw(address: str) -> None:
    """Takes and gives chunks; the first message says whether to hash and how many there are."""

    async def up(requests: AsyncIterator[bytes], _context: object) -> bytes:
        hashed = hashlib.sha256()
        hashing = await anext(aiter(requests)) == b"hash"
        async for chunk in requests:
            if hashing:
                hashed.update(chunk)
        return hashed.digest()

    async def down(request: bytes, _context: object) -> AsyncIterator[bytes]:
        asked = json.loads(request)
        hashed = hashlib.sha256()
        for _ in range(asked["chunks"]):
            if asked["hash"]:
                hashed.update(_BLOCK)
            yield _BLOCK

    server = grpc.aio.server()
    handlers = {
        "Up": grpc.stream_unary_rpc_method_handler(up),
        "Down": grpc.unary_stream_rpc_method_handler(down),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("benchmark.v1.Raw", handlers)])
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


async def _raw_up(channel: grpc.aio.Channel, chunks: int, *, hashing: bool) -> None:
    async def messages() -> AsyncIterator[bytes]:
        yield b"hash" if hashing else b"pass"
        hashed = hashlib.sha256()
        for _ in range(chunks):
            if hashing:
                hashed.update(_BLOCK)
            yield _BLOCK

    await channel.stream_unary(_UP)(messages())


async def _raw_down(channel: grpc.aio.Channel, chunks: int, *, hashing: bool) -> None:
    hashed = hashlib.sha256()
    async for chunk in channel.unary_stream(_DOWN)(json.dumps({"chunks": chunks, "hash": hashing}).encode()):
        if hashing:
            hashed.update(chunk)


async def _measure(registry: str, raw: str, folder: Path, size_mb: int) -> dict[str, list[list[float]]]:
    chunks = size_mb * _MB // CHUNK_BYTES
    times: dict[str, list[list[float]]] = {"upload": [], "download": []}
    pids = {"registry": _listening(folder), "client": os.getpid()}
    async with (
        Client(Key.generate(), origin=ORIGIN, registry=registry) as client,
        grpc.aio.insecure_channel(raw) as channel,
    ):
        await client.participants.RegisterParticipant(participant_pb2.RegisterParticipantRequest(display_name="one"))
        await _qualify(client.participant, registry, folder)
        # What is in flight at once, in all buffers on the way, is there from the first large file on.
        for number in range(_FIRST_FILES):
            first = folder / "first"
            await asyncio.to_thread(_write, first, _FIRST_MB)
            await download(client.artifacts, await upload(client.artifacts, first), folder / f"back {number}")
        # What the raw stream needs in this process is not ours.
        await _raw_up(channel, chunks, hashing=True)
        await _raw_down(channel, chunks, hashing=True)
        before = {name: _peak_mb(pid) for name, pid in pids.items()}
        for _ in range(_ROUNDS):
            file = folder / "model"
            await asyncio.to_thread(_write, file, size_mb)
            back = folder / "back"
            start = time.perf_counter()
            name = await upload(client.artifacts, file)
            spent = [time.perf_counter() - start]
            for hashing in (True, False):
                start = time.perf_counter()
                await _raw_up(channel, chunks, hashing=hashing)
                spent.append(time.perf_counter() - start)
            times["upload"].append(spent)
            start = time.perf_counter()
            await download(client.artifacts, name, back, size_bytes=file.stat().st_size)
            spent = [time.perf_counter() - start]
            for hashing in (True, False):
                start = time.perf_counter()
                await _raw_down(channel, chunks, hashing=hashing)
                spent.append(time.perf_counter() - start)
            times["download"].append(spent)
            back.unlink()
    grown = {f"{name} grown": [[_peak_mb(pid) - before[name]]] for name, pid in pids.items()}
    return times | grown


def _write(file: Path, size_mb: int) -> None:
    """Other bytes each time: what the registry has already is not sent again."""
    with file.open("wb") as opened:
        for _ in range(size_mb // 16):
            opened.write(os.urandom(16 * _MB))
        # Its way to the disk is not what is measured.
        os.fsync(opened.fileno())


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


async def _qualify(participant: str, registry: str, folder: Path) -> None:
    """Models of no task are for those to hand in who may create tasks."""
    deposit = stake_pb2.DepositRequest(
        participant=participant, amount_micros=_STAKE, reference="one", funding_account="somebody's"
    )
    operator, selector = Key.load(folder / "registry.pem"), f"unix:{folder / 'selector'}.sock"
    async with Client(operator, origin=ORIGIN, registry=registry, selector=selector) as client:
        await client.stakes.Deposit(deposit)


def _listening(folder: Path) -> int:
    """The registry's process, by its command and its state folder."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
                environment = (process / "environ").read_bytes()
            except OSError:
                continue
            if b"services.registry" in command and f"TILTYARD_STATE_DIR={folder}".encode() in environment:
                return int(process.name)
    raise LookupError("no registry process")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(_serve_raw(sys.argv[2]))
    else:
        registry_address, raw_address, state, size = sys.argv[2:]
        print(json.dumps(asyncio.run(_measure(registry_address, raw_address, Path(state), int(size)))))
