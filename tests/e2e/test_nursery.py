"""Confined children of a warm process, with real processes: how they serve, how they end, and that none is left."""

from __future__ import annotations  # the stubs' asynchronous types exist for the type checker only

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch

from services.modelserver.sandbox import Confinement
from services.modelserver.spawn import MODEL_NAME, Child, ChildEnded, ExitKind, Limits, Nursery, NurseryDown
from services.validator.children import NurseryAttempts
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc
from tiltyard.models import build, save_weights
from tiltyard.modelspec import Convnet, FaultCode, Linear, Mlp, ModelFault, ModelSpec, tensor_shapes, to_json

SPEC = ModelSpec((28, 28), 10, Mlp((128,)), 1 / 255)
ROWS = np.random.default_rng(0).integers(0, 256, (512, 28, 28), dtype=np.uint8)
# Few weights, and a gigabyte between its layers for one row.
GREEDY = ModelSpec((256, 256), 2, Convnet((4096,), kernel_size=1))
BUSY = ModelSpec((64, 64), 2, Convnet((64, 64), kernel_size=11))
ROOMY = Limits(memory_bytes=1 << 30, cpu_seconds=60)
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the nursery stands on Linux's process controls"),
    pytest.mark.asyncio(loop_scope="module"),
]


def put(folder: Path, spec: ModelSpec) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(to_json(spec)))
    save_weights(build(spec, seed=0), folder / "model.safetensors")
    return folder


async def infer(address: str, rows: np.ndarray, *, batches: int = 1) -> np.ndarray:
    """The logits of the last of several equal batches, over one stream."""
    message = pb.ModelInferRequest(model_name=MODEL_NAME, raw_input_contents=[rows.tobytes()])
    message.inputs.add(name="x", datatype="UINT8", shape=rows.shape)
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        last = None
        async for answer in rpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(message for _ in range(batches)):
            assert not answer.error_message, answer.error_message
            last = answer.infer_response
        assert last is not None
        return np.frombuffer(last.raw_output_contents[0], "<f4").reshape(last.outputs[0].shape)


async def gone(*pids: int) -> None:
    """Wait until none of the processes runs."""
    running = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            running.append(psutil.Process(pid))
    _, alive = await asyncio.to_thread(psutil.wait_procs, running, timeout=20)
    assert not alive


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(tmp_path_factory.mktemp("models") / "digits", SPEC)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def warm() -> AsyncIterator[Nursery]:
    # Importing torch takes a zygote seconds; what a test leaves behind is ended below.
    async with Nursery() as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def nursery(warm: Nursery) -> AsyncIterator[Nursery]:
    yield warm
    left = children_of(warm)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    await gone(*left)


def children_of(nursery: Nursery) -> list[int]:
    return [child.pid for child in psutil.Process(zygote_of(nursery)).children()]


def zygote_of(nursery: Nursery) -> int:
    (zygote,) = [c.pid for c in psutil.Process().children() if "--zygote" in c.cmdline()]
    return zygote


async def test_children_serve_what_the_model_answers_in_this_process(nursery: Nursery, digits: Path) -> None:
    with torch.inference_mode():
        expected = build(SPEC, seed=0).eval()(torch.tensor(ROWS)).numpy()
    seconds = []
    for threads in (1, 2, 0):
        child = await nursery.spawn(digits, Limits(1 << 30, 60, threads))
        np.testing.assert_allclose(await infer(child.address, ROWS, batches=5), expected, rtol=1e-4, atol=1e-5)
        end = await child.kill()
        assert (end.kind, await child.wait()) == (ExitKind.OK, end)
        assert 0 < end.cpu_seconds < 30
        seconds.append(end.cpu_seconds)
        await gone(child.pid)
        assert not os.path.exists(child.address.removeprefix("unix:"))
    # Importing torch alone takes more than a second.
    assert min(seconds) < 0.5


async def test_two_children_at_once_are_told_apart(nursery: Nursery, digits: Path, tmp_path: Path) -> None:
    other = ModelSpec((28, 28), 3, Linear())
    one, two = await asyncio.gather(nursery.spawn(digits, ROOMY), nursery.spawn(put(tmp_path / "other", other), ROOMY))
    assert (await infer(one.address, ROWS)).shape == (512, 10)
    assert (await infer(two.address, ROWS)).shape == (512, 3)
    await one.kill()
    assert (await infer(two.address, ROWS)).shape == (512, 3)
    await two.kill()


async def test_a_child_has_no_network_and_its_limits(nursery: Nursery, digits: Path) -> None:
    child = await nursery.spawn(digits, Limits(1 << 29, 77))
    status = Path(f"/proc/{child.pid}/status").read_text()
    assert nursery.confinement is not None
    assert nursery.confinement.network
    # Mode 2: a filter.
    assert nursery.confinement.programs == ("Seccomp:\t2\n" in status)
    if "namespace" in nursery.confinement.network:
        assert os.readlink(f"/proc/{child.pid}/ns/net") != os.readlink("/proc/self/ns/net")
    process = psutil.Process(child.pid)
    assert process.rlimit(psutil.RLIMIT_CPU)[0] == 77
    assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert 1 << 29 < process.rlimit(psutil.RLIMIT_DATA)[0] < 1 << 32
    assert os.readlink(f"/proc/{child.pid}/cwd") == str(digits)
    assert process.net_connections("inet") == []
    await child.kill()


async def test_the_filter_leaves_unix_sockets_and_takes_the_rest(tmp_path: Path) -> None:
    # A process of its own, since what is given up does not come back.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CONFINED, stdout=asyncio.subprocess.PIPE, cwd=tmp_path, env=IMPORTING
    )
    answered, _ = await process.communicate()
    tried = answered.decode().split()
    network, outcome = tried[0], tried[1:]
    if network == "open":
        pytest.skip("this kernel lets nothing be taken away")
    refused = [
        "inet",
        "connect",
        "message",
        "message_pair",
        "exec",
        "fork",
        "kill",
        "tgkill",
        "owner",
        "owner_ex",
        "owner_io",
        "group_io",
    ]
    refused += ["outlive", "session", "group", "user", "new_user"]
    refused += ["memory", "semaphore", "queue", "mqueue"]
    refused += ["limit", "mkdir", "chmod", "rename", "link", "fifo"]
    kept = ["pair", "named", "unblocked", "own", "threads"]
    assert outcome == ["unix:yes", *(f"{each}:no" for each in refused), *(f"{each}:yes" for each in kept)]
    assert process.returncode == -signal.SIGABRT


FROZEN = """
import os, socket, sys
from services.modelserver import sandbox
os.chdir(sys.argv[1])
os.mkdir("own")
os.chdir("own")
os.link("../there", "linked")
held = sandbox.confine(os.getppid(), None).files
if not held:
    sys.exit("this kernel has no Landlock")
for change in (
    lambda: open("../there", "a"),
    lambda: os.unlink("../there"),
    lambda: os.truncate("../there", 0),
    lambda: os.rmdir("../empty"),
    lambda: os.open("../new", os.O_CREAT),
    lambda: os.open("new", os.O_CREAT),
    lambda: open("linked", "a"),
    lambda: os.unlink("linked"),
):
    try:
        change()
    except PermissionError:
        print("refused")
with open("/dev/null", "w") as null:
    print(open("../there").read(), file=null)
socket.socket(socket.AF_UNIX).bind("socket")
"""


async def test_files_are_read_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    (tmp_path / "empty").mkdir()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FROZEN, str(tmp_path)), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    told, complaint = await process.communicate()
    if b"no Landlock" in complaint:
        pytest.skip("this kernel has no Landlock")
    assert (process.returncode, told.split(), complaint) == (0, [b"refused"] * 8, b"")
    assert (tmp_path / "there").read_text() == "kept"


REFUSING = """
from services.modelserver import sandbox
class Kernel:
    def unshare(self, flags):
        return -1
    def prctl(self, *arguments):
        return -1
    def syscall(self, *arguments):
        return -1
sandbox._libc = Kernel()
print(sandbox.try_out([], lambda: None))
"""


async def test_what_the_kernel_does_not_let_be_taken_away_is_said(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", REFUSING, stdout=asyncio.subprocess.PIPE)
    told, _ = await process.communicate()
    open_ = (
        "with the network, which the kernel leaves it, able to start processes and programs, able to change files, and "
        "able to read those of its user"
    )
    assert told.decode().strip() == open_
    nursery = Nursery()
    attempts = NurseryAttempts(nursery, folder=tmp_path / "children", threads=1, concurrency=1)
    assert "not known yet" in attempts.isolation()
    nursery.confinement = Confinement(network="", programs=False, files=False, reads=False)
    assert attempts.isolation().endswith(f"CPU time and files, {open_}.")
    attempts.close()


CONFINED = """
import ctypes, errno, fcntl, os, resource, signal, socket, threading
from services.modelserver import sandbox

def attempt(name, act):
    try:
        act()
    except PermissionError:
        print(f"{name}:no", flush=True)
    else:
        print(f"{name}:yes", flush=True)

open("made", "w").close()
sandbox.limit_files()
parent = os.getppid()
libc = sandbox._libc
def tgkill():
    if libc.syscall(234 if os.uname().machine == "x86_64" else 131, parent, parent, 0) < 0:
        raise PermissionError
def prctl(option, value):
    if libc.prctl(option, value, 0, 0, 0) < 0:
        raise PermissionError
def new_user():
    if libc.unshare(sandbox._CLONE_NEWUSER) < 0:
        raise PermissionError
def refused_by_libc(call, *given):
    # EPERM: without the filter each of them is another error, or a thing that this would leave behind.
    if call(*given) < 0 and ctypes.get_errno() == errno.EPERM:
        raise PermissionError
left, right = socket.socketpair()
other = socket.socket(socket.AF_UNIX)
other.bind("other")
other.listen()
confinement = sandbox.confine(parent, None)
print("filtered" if "filter" in confinement.network else "open")
attempt("unix", lambda: socket.socket(socket.AF_UNIX).close())
attempt("inet", lambda: socket.socket(socket.AF_INET).close())
attempt("connect", lambda: socket.socket(socket.AF_UNIX).connect("other"))
attempt("message", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
attempt("message_pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("fork", lambda: os.fork() or os._exit(0))
attempt("kill", lambda: os.kill(parent, 0))
attempt("tgkill", tgkill)
attempt("owner", lambda: fcntl.fcntl(left, fcntl.F_SETOWN, parent))
attempt("owner_ex", lambda: fcntl.fcntl(left, 15, (parent << 32).to_bytes(8, "little")))
attempt("owner_io", lambda: fcntl.ioctl(left, 0x8901, parent.to_bytes(4, "little")))
attempt("group_io", lambda: fcntl.ioctl(left, 0x8902, parent.to_bytes(4, "little")))
attempt("outlive", lambda: prctl(1, 0))
attempt("session", os.setsid)
attempt("group", lambda: os.setpgid(0, 0))
attempt("user", lambda: os.setuid(os.getuid()))
attempt("new_user", new_user)
attempt("memory", lambda: refused_by_libc(libc.shmctl, -1, 0, None))
attempt("semaphore", lambda: refused_by_libc(libc.semget, 0, 0, 0))
attempt("queue", lambda: refused_by_libc(libc.msgctl, -1, 0, None))
attempt("mqueue", lambda: refused_by_libc(libc.mq_open, b"/there is none", 0))
attempt("limit", lambda: resource.prlimit(parent, resource.RLIMIT_CPU))
attempt("mkdir", lambda: os.mkdir("folder"))
attempt("chmod", lambda: os.chmod(".", 0))
attempt("rename", lambda: os.rename("made", "renamed"))
attempt("link", lambda: os.symlink("made", "link"))
attempt("fifo", lambda: os.mkfifo("fifo"))
attempt("pair", socket.socketpair)
attempt("named", lambda: prctl(15, b"named"))
attempt("unblocked", lambda: left.setblocking(False))
attempt("own", lambda: resource.prlimit(0, resource.RLIMIT_CPU))
thread = threading.Thread(target=print, args=("threads:yes",), kwargs={"flush": True})
thread.start()
thread.join()
os.abort()
"""
# The tests begin where the sources lie.
IMPORTING = {**os.environ, "PYTHONPATH": str(Path.cwd())}


async def test_a_folder_of_children_that_cannot_be_removed_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_deep(folder: Path, *, ignore_errors: bool) -> None:
        raise RecursionError

    (tmp_path / "children").mkdir()
    monkeypatch.setattr("shutil.rmtree", too_deep)
    NurseryAttempts(Nursery(), folder=tmp_path / "children", threads=1, concurrency=1).close()


async def test_out_of_memory_is_named(nursery: Nursery, tmp_path: Path) -> None:
    child = await nursery.spawn(put(tmp_path / "greedy", GREEDY), Limits(64 << 20, 60))
    with pytest.raises(grpc.aio.AioRpcError):
        await infer(child.address, np.zeros((1, 256, 256), dtype=np.uint8))
    assert (await child.wait()).kind is ExitKind.OUT_OF_MEMORY


async def test_weights_over_the_memory_limit_are_named(nursery: Nursery, tmp_path: Path) -> None:
    spec = ModelSpec((28, 28), 10, Mlp((12_000, 12_000)))
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps(to_json(spec)))
    sparse_weights(folder / "model.safetensors", spec)
    with pytest.raises(ChildEnded) as caught:
        await nursery.spawn(folder, Limits(16 << 20, 60))
    assert caught.value.exit.kind is ExitKind.OUT_OF_MEMORY


async def test_too_slow_is_counted_in_cpu_seconds(nursery: Nursery, tmp_path: Path) -> None:
    child = await nursery.spawn(put(tmp_path / "busy", BUSY), Limits(1 << 30, 1))
    with pytest.raises(grpc.aio.AioRpcError):
        await infer(child.address, np.zeros((64, 64, 64), dtype=np.uint8), batches=10_000)
    end = await child.wait()
    assert end.kind is ExitKind.TOO_SLOW
    assert 0.9 < end.cpu_seconds < 10


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGSEGV, ExitKind.CRASHED),
        (signal.SIGABRT, ExitKind.CRASHED),
        (signal.SIGKILL, ExitKind.KILLED),
        (signal.SIGTERM, ExitKind.KILLED),
    ],
)
async def test_a_crash_is_the_models_and_a_kill_from_outside_is_not(
    nursery: Nursery, digits: Path, number: signal.Signals, kind: ExitKind
) -> None:
    child = await nursery.spawn(digits, ROOMY)
    os.kill(child.pid, number)
    assert (await child.wait()).kind is kind
    again = await nursery.spawn(digits, ROOMY)
    assert (await infer(again.address, ROWS)).shape == (512, 10)
    assert (await child.kill()).kind is kind


async def test_what_the_disk_does_not_give_is_no_fault_of_the_model(nursery: Nursery, tmp_path: Path) -> None:
    folder = put(tmp_path / "m", SPEC)
    child = await nursery.spawn(folder, ROOMY)
    # To a process that has mapped it, a file that became shorter is one whose pages cannot be read.
    os.truncate(folder / "model.safetensors", 4096)
    with pytest.raises(grpc.aio.AioRpcError):
        await infer(child.address, ROWS)
    assert (await child.wait()).kind is ExitKind.KILLED
    (folder / "model.safetensors").unlink()
    with pytest.raises(ChildEnded, match=r"cannot be read: .*No such file") as caught:
        await nursery.spawn(folder, ROOMY)
    assert caught.value.exit.kind is ExitKind.KILLED


async def test_files_that_make_no_model_are_faults(nursery: Nursery, digits: Path, tmp_path: Path) -> None:
    folder = put(tmp_path / "m", ModelSpec((28, 28), 9, Mlp((128,))))
    (folder / "spec.json").write_text(json.dumps(to_json(SPEC)))
    with pytest.raises(ModelFault) as caught:
        await nursery.spawn(folder, ROOMY)
    assert caught.value.code is FaultCode.SHAPE_MISMATCH
    (folder / "model.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ModelFault) as caught:
        await nursery.spawn(folder, ROOMY)
    assert caught.value.code is FaultCode.BAD_FORMAT
    child = await nursery.spawn(digits, ROOMY)
    assert children_of(nursery) == [child.pid]


async def test_a_dead_zygote_takes_its_children_along_and_another_starts(nursery: Nursery, digits: Path) -> None:
    child = await nursery.spawn(digits, ROOMY)
    zygote = zygote_of(nursery)
    os.kill(zygote, signal.SIGKILL)
    assert (await child.wait()).kind is ExitKind.KILLED
    await gone(child.pid, zygote)
    again = await nursery.spawn(digits, ROOMY)
    assert (await infer(again.address, ROWS)).shape == (512, 10)


async def test_closing_ends_all_and_refuses_more(digits: Path) -> None:
    async with Nursery() as nursery:
        child = await nursery.spawn(digits, ROOMY)
        zygote = psutil.Process(child.pid).ppid()
    assert (await child.wait()).kind is ExitKind.KILLED
    await gone(child.pid, zygote)
    with pytest.raises(NurseryDown):
        await nursery.spawn(digits, ROOMY)


async def test_a_spawn_given_up_leaves_no_child(nursery: Nursery, digits: Path) -> None:
    with pytest.raises(NurseryDown):
        await nursery.spawn(digits, ROOMY, timeout_s=0.001)
    await gone(*children_of(nursery))
    # What comes next is a child of its own.
    child = await nursery.spawn(digits, ROOMY)
    assert children_of(nursery) == [child.pid]


OWNER = """
import asyncio, sys
from pathlib import Path
from services.modelserver.spawn import Limits, Nursery
assert "torch" not in sys.modules

async def main():
    nursery = Nursery()
    await nursery.start()
    child = await nursery.spawn(Path(sys.argv[1]), Limits(1 << 30, 60))
    print(child.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_nothing_outlives_its_owner_however_that_ends(digits: Path) -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(digits), stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout is not None
    child = int(await owner.stdout.readline())
    zygote = psutil.Process(child).ppid()
    owner.kill()
    await owner.wait()
    await gone(child, zygote)


async def test_a_folder_too_deep_for_a_socket_is_served_all_the_same(nursery: Nursery, tmp_path: Path) -> None:
    deep = [put(tmp_path / ("deep" * 25) / name, SPEC) for name in ("one", "two")]
    for folder in deep:
        child: Child = await nursery.spawn(folder, ROOMY)
        assert len(child.address) < 100 < len(str(folder))
        assert (folder / "model.sock").is_socket()
        assert (await infer(child.address, ROWS)).shape == (512, 10)
        await child.kill()
        assert not (folder / "model.sock").exists()
    # The way to a folder ends with its child.
    assert not [each for each in os.listdir("/proc/self/fd") if _is_below(each, tmp_path)]


def _is_below(descriptor: str, folder: Path) -> bool:
    try:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(folder)
    except FileNotFoundError:
        return False


def sparse_weights(path: Path, spec: ModelSpec) -> None:
    """A weights file of zeros that takes no room on the disk."""
    entries, position = {}, 0
    for name, shape in tensor_shapes(spec).items():
        end = position + 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)
