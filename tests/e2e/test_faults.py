"""Submissions of which most are bad, over real services whose validators are killed meanwhile: each ends as it must."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from tiltyard.cli.memberships import join_task
from tiltyard.cli.supervisor import Supervisor, free_ports
from tiltyard.cli.up import arena_programs, node_program
from tiltyard.client import Client, new_request_id, persist, watch
from tiltyard.commitments import submission_commitment
from tiltyard.datasets import write_dataset
from tiltyard.filedigest import file_digest
from tiltyard.identity import Key
from tiltyard.modelspec import Linear, ModelSpec, Onnx
from tiltyard.registry.v1 import participant_pb2, submission_pb2, task_pb2
from tiltyard.selector.v1 import stake_pb2
from tiltyard.statements import sign_statement
from tiltyard.submitting import submit_model
from tiltyard.transfers import upload
from tiltyard.type.v1 import envelope_pb2, evaluation_pb2, model_pb2
from tiltyard.type.v1 import task_pb2 as task_type_pb2
from tiltyard.wire import model_spec_to_proto

ORIGIN = "tiltyard.local"
MICROS = 1_000_000
WIDTH, CLASSES = 16, 3
LINEAR = ModelSpec((WIDTH,), CLASSES, Linear())
GRAPH = ModelSpec((WIDTH,), CLASSES, Onnx())
MAX_PARAMETERS = 5000
NODES = 2
SUBMITTING_AT_ONCE = 4
X = np.random.default_rng(0).normal(size=(1500, WIDTH)).astype(np.float32)
Y = X[:, :CLASSES].argmax(axis=1)


def weights(seed: int, *, classes: int = CLASSES, spoil: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(classes, WIDTH)).astype(np.float32)
    matrix[:CLASSES, :CLASSES] += 2 * np.eye(CLASSES, dtype=np.float32)
    return {"head.weight": matrix + np.float32(spoil), "head.bias": np.zeros(classes, np.float32)}


def graph(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> bytes:
    whole = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def large(seed: int) -> bytes:
    middle = np.full((WIDTH, MAX_PARAMETERS), seed, np.float32)
    nodes = [helper.make_node("MatMul", ["x", "v"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    return graph(nodes, {"v": middle, "w": np.ones((MAX_PARAMETERS, CLASSES), np.float32)})


def endless(seed: int) -> bytes:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Sin", ["a"], ["b"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, []), helper.make_tensor_value_info("b", 1, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Loop", ["rounds", "", "h"], ["y"], body=body),
    ]
    return graph(nodes, {"rounds": np.array(1 << 60), "w": np.full((WIDTH, CLASSES), seed, np.float32)})


def crashing(seed: int) -> bytes:
    """Asks for a row that is not there, as soon as it runs."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Gather", ["h", "index"], ["g"], axis=0),
        helper.make_node("Add", ["h", "g"], ["y"]),
    ]
    return graph(nodes, {"index": np.array([1 << 40]), "w": np.full((WIDTH, CLASSES), seed, np.float32)})


@dataclass(frozen=True)
class Kind:
    """One kind of submission: its file, which of the task's models it is of, and how it must end ("": SCORED)."""

    content: Callable[[int], bytes]
    reason: str = ""
    model_index: int = 0


GOOD = Kind(lambda seed: save(weights(seed)))
KINDS = {
    "good": GOOD,
    "nan": Kind(lambda seed: save(weights(seed, spoil=np.nan) | {"head.bias": np.full(3, seed, "f4")}), "NAN_OUTPUT"),
    "shape": Kind(lambda seed: save(weights(seed, classes=CLASSES + 1)), "SHAPE_MISMATCH"),
    # Other bytes than committed to are not taken, so nothing can be revealed.
    "digest": Kind(lambda seed: save(weights(seed)), "REVEAL_EXPIRED"),
    "truncated": Kind(lambda seed: save(weights(seed))[:-5], "BAD_FORMAT"),
    "large": Kind(large, "TOO_LARGE", 1),
    "slow": Kind(endless, "TOO_SLOW", 1),
    "copy": Kind(lambda seed: save(weights(seed)), "COPY"),
    "crash": Kind(crashing, "CRASHED", 1),
    "also good": GOOD,
}


class Arena:
    """Registry, selector and validators as processes, and two training nodes that are nothing but keys.

    Each submission is judged by `judges` validators, of two more.
    """

    def __init__(self, supervisor: Supervisor, stack: AsyncExitStack, *, judges: int) -> None:
        self.supervisor = supervisor
        self._stack = stack
        self._judges = judges
        self.nodes: list[Client] = []

    async def open(self) -> str:
        """Start everything, and open a task with everybody in it; its name."""
        ports = free_ports(4 + self._judges)
        operator, creator = (self._key(name) for name in ("operator", "creator"))
        arena = arena_programs(
            self.supervisor, registry_port=ports[0], selector_port=ports[1], operator=operator.id, origin=ORIGIN
        )
        self._registry, self._selector = (program.address for program in arena)
        names = [f"validator-{number}" for number in range(self._judges + 2)]
        programs = [
            node_program(
                self.supervisor,
                name,
                kind="validator",
                port=port,
                registry=self._registry,
                operator=operator.id,
                origin=ORIGIN,
            )
            for name, port in zip(names, ports[2:], strict=True)
        ]
        await self.supervisor.start([*arena, *programs])
        await self.supervisor.until_serving(timeout_s=120)
        self.creator = self._client(creator)
        self.nodes = [self._client(self._key(f"node-{number}")) for number in range(NODES)]
        validators = [self._client(self._key(name)) for name in names]
        bank = self._client(operator)
        for number, client in enumerate([bank, self.creator, *self.nodes, *validators]):
            await persist(
                lambda client=client: client.participants.RegisterParticipant(
                    participant_pb2.RegisterParticipantRequest(display_name="p", request_id=new_request_id())
                )
            )
            request = stake_pb2.DepositRequest(
                participant=client.participant,
                amount_micros=1000 * MICROS,
                reference=f"r{number}",
                funding_account=f"account {number}",
                request_id=new_request_id(),
            )
            await persist(lambda request=request: bank.stakes.Deposit(request))
        return await self._open_task(validators)

    def _key(self, name: str) -> Key:
        return Key.load_or_create(self.supervisor.folder(name) / "key.pem")

    def _client(self, key: Key) -> Client:
        client = Client(key, origin=ORIGIN, registry=self._registry, selector=self._selector)
        self._stack.push_async_callback(client.close)
        return client

    async def _open_task(self, validators: list[Client]) -> str:
        path = self.supervisor.folder("creator") / "evaluation.safetensors"
        write_dataset(path, X, Y)
        digest = task_type_pb2.DatasetDigest(sha256=file_digest(path), size_bytes=path.stat().st_size)
        config = task_type_pb2.TaskConfig(
            display_name="faults",
            models=[model_spec_to_proto(LINEAR), model_spec_to_proto(GRAPH)],
            evaluation_dataset=digest,
            validators_per_submission=self._judges,
        )
        config.selection.validator_min_stake_micros = config.selection.training_node_min_stake_micros = 100 * MICROS
        config.limits.max_parameters = MAX_PARAMETERS
        # Each slow model uses it up twice with each judge; the others need a tenth of it.
        config.limits.max_cpu_time.FromTimedelta(timedelta(seconds=1))
        config.limits.daily_submissions = 1_000_000
        config.selection.rate.limit = 100_000
        config.schedule.reveal_time.FromTimedelta(timedelta(seconds=20))
        request = task_pb2.CreateTaskRequest(task_id="faults", config=config, request_id=new_request_id())
        task = (await persist(lambda: self.creator.tasks.CreateTask(request))).task.name
        await upload(self.creator.artifacts, path, task=task)
        await self._until(task, lambda seen: seen.state == task_type_pb2.TASK_STATE_OPEN)
        for client in self.nodes:
            await join_task(client, task, "training-node")
        for client in validators:
            await join_task(client, task, "validator")
        await self._until(task, lambda seen: seen.validators == len(validators))
        return task

    async def _until(self, task: str, holds: Callable[[task_pb2.Task], bool]) -> None:
        async for seen in watch(self.creator.tasks.WatchTask, task_pb2.WatchTaskRequest(name=task)):
            if holds(seen.task):
                return


async def submit(client: Client, task: str, kind: str, seed: int, folder: Path) -> str:
    """One submission; its name."""
    path = folder / f"{seed}"
    path.write_bytes(KINDS[kind].content(seed))
    if kind != "digest":
        return await submit_model(
            client,
            task=task,
            model=path,
            model_index=KINDS[kind].model_index,
            format=model_pb2.MODEL_FORMAT_ONNX if KINDS[kind].model_index else model_pb2.MODEL_FORMAT_SAFETENSORS,
            journal=folder / f"{seed}.journal",
        )
    digest, salt = os.urandom(32), os.urandom(32)
    commitment = submission_commitment(
        origin=ORIGIN, task=task, participant=client.participant, model_digest=digest, salt=salt
    )
    committed = envelope_pb2.CommitStatement(
        origin=ORIGIN, task=task, participant=client.participant, commitment=commitment
    )
    request = submission_pb2.CommitSubmissionRequest(
        statement=sign_statement(client.key, committed), request_id=new_request_id()
    )
    name = (await persist(lambda: client.submissions.CommitSubmission(request))).submission.name
    await upload(client.artifacts, path, submission=name)
    revealed = envelope_pb2.RevealStatement(
        origin=ORIGIN, submission=name, model_digest=file_digest(path), salt=salt, format=1, model_index=0
    )
    with pytest.raises(grpc.aio.AioRpcError, match="commitment"):
        await client.submissions.RevealSubmission(
            submission_pb2.RevealSubmissionRequest(
                statement=sign_statement(client.key, revealed), request_id=new_request_id()
            )
        )
    return name


async def ended(client: Client, task: str) -> dict[str, submission_pb2.Submission]:
    """The submissions of the task that have ended, by name."""
    over = (evaluation_pb2.SUBMISSION_STATE_SCORED, evaluation_pb2.SUBMISSION_STATE_REJECTED)
    found: dict[str, submission_pb2.Submission] = {}
    token = ""
    while True:
        request = submission_pb2.ListSubmissionsRequest(parent=task, page_size=1000, page_token=token)
        page = await persist(lambda request=request: client.submissions.ListSubmissions(request))
        found |= {each.name: each for each in page.submissions if each.state in over}
        if not (token := page.next_page_token):
            return found


async def watch_and_kill(arena: Arena, task: str, count: int, *, every: int) -> dict[str, submission_pb2.Submission]:
    """All `count` submissions once they have ended; a validator at random is killed after each `every` of them."""
    chance = random.Random(0)
    kills = 0
    while len(found := await ended(arena.creator, task)) < count:
        if len(found) >= every * (kills + 1):
            # By progress and not by the clock: on a busy machine they would never get anywhere.
            validators = [pid for name, pid in sorted(arena.supervisor.pids().items()) if name.startswith("validator")]
            with suppress(IndexError, ProcessLookupError):  # the chosen one, or all of them, are dead already
                os.kill(chance.choice(validators), signal.SIGKILL)
                kills += 1
        await asyncio.sleep(0.5)
    return found


def right_ones(seed: int) -> int:
    tensors = weights(seed)
    return int(((X @ tensors["head.weight"].T).argmax(axis=1) == Y).sum())


async def submit_all(arena: Arena, task: str, count: int, folder: Path) -> dict[str, tuple[str, int]]:
    """`count` submissions, a tenth of each kind, several at once; kind and seed by name."""
    submitted: dict[str, tuple[str, int]] = {}
    places = asyncio.Semaphore(SUBMITTING_AT_ONCE)

    async def one(place: int) -> None:
        kind = list(KINDS)[place % len(KINDS)]
        # A copy is of the good one of its ten, by the other node.
        seed = place - list(KINDS).index("copy") if kind == "copy" else place
        async with places:
            own = folder / f"{place}"
            own.mkdir()
            name = await submit(arena.nodes[kind == "copy"], task, kind, seed, own)
        submitted[name] = (kind, seed)

    def of(*kinds: str) -> list[int]:
        return [place for place in range(count) if list(KINDS)[place % len(KINDS)] in kinds]

    # Those that end with their time to reveal first, the copies after what they copy.
    for kinds in (("digest",), [kind for kind in KINDS if kind not in ("digest", "copy")], ("copy",)):
        async with asyncio.TaskGroup() as group:
            for place in of(*kinds):
                group.create_task(one(place))
    return submitted


@pytest.mark.parametrize(
    ("count", "judges", "kill_every"),
    [
        pytest.param(50, 1, 10, marks=pytest.mark.timeout(600)),
        pytest.param(1000, 3, 25, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)
async def test_every_submission_ends_as_it_must_whatever_is_killed(
    tmp_path: Path, count: int, judges: int, kill_every: int
) -> None:
    async with AsyncExitStack() as stack:
        deaths: list[str] = []
        supervisor = await stack.enter_async_context(Supervisor(tmp_path / "state", report=deaths.append))
        arena = Arena(supervisor, stack, judges=judges)
        task = await arena.open()
        async with asyncio.TaskGroup() as group:
            submitting = group.create_task(submit_all(arena, task, count, tmp_path))
            watching = group.create_task(watch_and_kill(arena, task, count, every=kill_every))
        submitted, found = submitting.result(), watching.result()
        assert len(deaths) >= count // kill_every - 2, deaths
    for name, (kind, seed) in submitted.items():
        each = found[name]
        reason = evaluation_pb2.RejectionReason.Name(each.reason).removeprefix("REJECTION_REASON_")
        assert (kind, reason) == (kind, KINDS[kind].reason or "UNSPECIFIED"), each
        if not KINDS[kind].reason:
            assert (each.score.correct, each.score.total) == (right_ones(seed), len(Y)), each
