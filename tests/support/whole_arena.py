"""All services of an arena in one process, behind real servers, with a task in the middle of its life."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from services.registry.bootstrap import Registry
from services.registry.bootstrap import build as build_registry
from services.registry.settings import RegistrySettings
from services.runtime.server import ArenaServer
from services.runtime.settings import ServiceSettings
from services.selector.bootstrap import build as build_selector
from services.selector.settings import SelectorSettings
from services.trainer.bootstrap import build as build_trainer
from services.trainer.settings import TrainerSettings
from services.validator.bootstrap import build as build_validator
from services.validator.settings import ValidatorSettings
from tests.support.registry_server import artifact_name as name_of
from tests.support.registry_server import config_of, dataset_bytes, join_request, uploading
from tiltyard.client import Client
from tiltyard.datasets import write_dataset
from tiltyard.identity import Key
from tiltyard.modelspec import Mlp, ModelSpec, tensor_shapes
from tiltyard.registry.v1 import artifact_pb2, assignment_pb2, participant_pb2, task_pb2
from tiltyard.selector.v1 import stake_pb2
from tiltyard.submitting import submit_model
from tiltyard.type.v1 import participation_pb2
from tiltyard.type.v1 import task_pb2 as type_task_pb2

ORIGIN = "arena.test"
SPEC = ModelSpec((4,), 3, Mlp((8, 8, 8)))
DEPOSIT_MICROS = 1_000_000
TASKS = ("running", "spare-1", "spare-2", "preparing")


@dataclass(frozen=True)
class Endpoint:
    """A server, and what its callers' tokens name."""

    address: str
    audience: str


class WholeArena:
    """Registry, selector, trainer and validator. A second selector has pools that no registry knows of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = {
            name: Key.generate()
            for name in ("operator", "registry", "creator", "node", "one", "two", "three", "stranger")
        }
        self.registry: Registry
        self.endpoints: dict[str, Endpoint] = {}
        self.assignment = ""
        self.dataset = dataset_bytes(folder)
        self._clients: dict[str, Client] = {}
        self._running = contextlib.AsyncExitStack()

    def databases(self) -> dict[str, Path]:
        """The SQLite files of registry and selectors."""
        return {
            name: self.folder / name / f"{name.split('-')[0]}.db" for name in ("registry", "selector", "selector-2")
        }

    async def start(self) -> None:
        """Serves all, and brings the task `running` to where its validators hold assignments."""
        operators, services = frozenset({self.keys["operator"].id}), frozenset({self.keys["registry"].id})
        shared: dict[str, Any] = {"origin": ORIGIN, "listen": "127.0.0.1:0", "operators": operators}
        stakes = {
            "validator_min_stake_micros": 100,
            "training_node_min_stake_micros": 10,
            "task_creator_min_stake_micros": 100,
        }
        for name in ("selector", "selector-2"):
            settings = SelectorSettings(state_dir=self.folder / name, services=services, **shared, **stakes)
            await self._serve(name, settings, await build_selector(settings), f"{ORIGIN}/selector")
        self.keys["registry"].save(self.folder / "registry" / "key.pem")
        selector = self.endpoints["selector"].address
        registry = RegistrySettings(
            state_dir=self.folder / "registry",
            selector=selector,
            max_artifact_bytes=1 << 20,
            # All callers have one address, and some of them make tens of thousands of calls.
            strangers_per_day_per_address=0,
            strangers_per_day=0,
            changes_per_day=0,
            **shared,
        )
        self.registry = await build_registry(registry)
        await self.registry.begin()
        await self._serve("registry", registry, self.registry, f"{ORIGIN}/registry")
        referee = asyncio.create_task(self.registry.referee.run())
        self._running.push_async_callback(_ended, referee)
        address = self.endpoints["registry"].address
        trainer = TrainerSettings(state_dir=self.folder / "trainer", registry=address, device="cpu", **shared)
        trainer.data_dir.mkdir(parents=True)
        write_dataset(trainer.data_dir / "d.safetensors", np.zeros((8, 4), np.float32), np.arange(8) % 3)
        built = await build_trainer(trainer)
        await self._serve("trainer", trainer, built, built.key.id)
        validator = ValidatorSettings(state_dir=self.folder / "validator", registry=address, **shared)
        judge = await build_validator(validator, on_drained=lambda: None)
        await self._serve("validator", validator, judge, judge.key.id)
        await self._begin()

    async def stop(self) -> None:
        """Ends all."""
        for client in self._clients.values():
            await client.close()
        await self._running.aclose()

    def client(self, name: str) -> Client:
        """A client that signs with the key `name`."""
        if name not in self._clients:
            self._clients[name] = Client(
                self.keys[name],
                origin=ORIGIN,
                registry=self.endpoints["registry"].address,
                selector=self.endpoints["selector"].address,
            )
        return self._clients[name]

    async def settle(self) -> None:
        """Lets the registry's background work catch up with what was asked of it, the selector's events included."""
        for _ in range(3):
            await self.registry.referee.turn()

    async def _serve(self, name: str, settings: ServiceSettings, built: Any, audience: str) -> None:
        for close in getattr(built, "on_close", None) or getattr(built, "closing", None) or (built.close,):
            self._running.push_async_callback(close)
        server = ArenaServer(
            settings.listen,
            built.mounts,
            authenticator=built.authenticator,
            policy=built.policy,
            remembered=built.database,
            stream_idle_s=20,
        )
        await self._running.enter_async_context(server)
        self.endpoints[name] = Endpoint(server.address, audience)

    async def _begin(self) -> None:
        for name in ("operator", "creator", "node", "one", "two", "three"):
            client = self.client(name)
            registered = participant_pb2.RegisterParticipantRequest(display_name=name)
            await client.participants.RegisterParticipant(registered)
        await self._deposit("creator", "creating")
        creator = self.client("creator")
        for task in TASKS:
            config = config_of(self.dataset)
            config.validators_per_submission = 2
            await creator.tasks.CreateTask(task_pb2.CreateTaskRequest(task_id=task, config=config))
            if task != "preparing":
                header = artifact_pb2.UploadHeader(
                    artifact=name_of(self.dataset), size_bytes=len(self.dataset), task=f"tasks/{task}"
                )
                await creator.artifacts.UploadArtifact(uploading(header, self.dataset))
                await self._until(lambda: self._is_open(task))  # noqa: B023 - awaited within the turn
                await self._join(task)
        model = self.folder / "model.safetensors"
        numbers = np.random.default_rng(0)
        save_file(
            {name: numbers.random(shape).astype(np.float32) for name, shape in tensor_shapes(SPEC).items()}, model
        )
        await submit_model(self.client("node"), task="tasks/running", model=model, journal=self.folder / "journal.json")
        await self._until(self._is_assigned)

    async def _deposit(self, name: str, purpose: str) -> None:
        deposit = stake_pb2.DepositRequest(
            participant=self.client(name).participant,
            amount_micros=DEPOSIT_MICROS,
            reference=f"{name} for {purpose}",
            funding_account=f"account of {name}",
        )
        await self.client("operator").stakes.Deposit(deposit)

    async def _join(self, task: str) -> None:
        roles = {"node": participation_pb2.ROLE_TRAINING_NODE}
        for name in ("node", "one", "two", "three"):
            # All that is available is locked for the task.
            await self._deposit(name, task)
            role = roles.get(name, participation_pb2.ROLE_VALIDATOR)
            request = join_request(self.keys[name], role, task=task, origin=ORIGIN)
            await self.client(name).memberships.JoinTask(request)

    async def _until(self, true: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(60):
            while not await true():  # noqa: ASYNC110 - asked of a service
                await asyncio.sleep(0.02)

    async def _is_open(self, task: str) -> bool:
        answer = await self.client("creator").tasks.GetTask(task_pb2.GetTaskRequest(name=f"tasks/{task}"))
        return answer.task.state == type_task_pb2.TASK_STATE_OPEN

    async def _is_assigned(self) -> bool:
        request = assignment_pb2.ListAssignmentsRequest()
        for name in ("one", "two", "three"):
            found = (await self.client(name).assignments.ListAssignments(request)).assignments
            if found:
                self.assignment = found[0].name
                return True
        return False


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
