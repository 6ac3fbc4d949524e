"""Who plays in the demo: the processes, their keys, and a client for everybody."""

import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tiltyard.cli.connection import DEFAULT_ORIGIN, key_lock
from tiltyard.cli.demo.data import Rows, Split
from tiltyard.cli.service_settings import asked_for
from tiltyard.cli.supervisor import Program, Supervisor, free_ports
from tiltyard.cli.up import DATA_FOLDER, arena_programs, lock_settings, node_program
from tiltyard.client import Client, Node
from tiltyard.datasets import write_dataset
from tiltyard.identity import Key

SHARD = "shard.safetensors"


@dataclass(frozen=True)
class Participant:
    """A key with a name for people and its clients; `node` and `model_index` where it runs a node."""

    name: str
    client: Client
    node: Node | None = None
    model_index: int = 0


@dataclass(frozen=True)
class Cast:
    """Everybody on stage."""

    operator: Participant
    creator: Participant
    trainers: tuple[Participant, ...]
    validators: tuple[Participant, ...]
    registry: str
    selector: str

    @property
    def members(self) -> tuple[Participant, ...]:
        """Who joins the task."""
        return self.trainers + self.validators

    def name_of(self, participant: str) -> str:
        """The name for people of a participants/{id}."""
        everybody = (self.operator, self.creator, *self.members)
        return next((each.name for each in everybody if each.client.participant == participant), participant)


async def open_stage(supervisor: Supervisor, stack: AsyncExitStack, divided: Split, *, validators: int) -> Cast:
    """Starts all processes at once, one training node for each shard, and connects everybody. Raises StartFailed."""
    trainers = len(divided.shards)
    ports = free_ports(2 + trainers + validators)
    lock = key_lock()
    operator = Key.load_or_create(supervisor.folder("operator") / "key.pem", lock)
    creator = Key.load_or_create(supervisor.folder("creator") / "key.pem", lock)
    registry, selector = arena_programs(
        supervisor,
        registry_port=ports[0],
        selector_port=ports[1],
        operator=operator.id,
        origin=DEFAULT_ORIGIN,
        lock=lock,
        settings=lock_settings(),
    )
    # Half of the cores train; on the others validators judge meanwhile.
    threads = {"TRAINING_THREADS": str(max(1, (os.cpu_count() or 1) // 2 // trainers))}
    names = [("trainer", f"trainer-{n}") for n in range(1, trainers + 1)]
    names += [("validator", f"validator-{n}") for n in range(1, validators + 1)]
    nodes = [
        node_program(
            supervisor,
            name,
            kind=kind,
            port=port,
            registry=registry.address,
            operator=operator.id,
            origin=DEFAULT_ORIGIN,
            lock=lock,
            settings={**lock_settings(), **(threads if kind == "trainer" else {})},
        )
        for (kind, name), port in zip(names, ports[2:], strict=True)
    ]
    for program, shard in zip(nodes, divided.shards, strict=False):
        folder = supervisor.folder(program.name) / DATA_FOLDER
        await asyncio.to_thread(write_rows, folder / SHARD, shard)
    kinds = ["registry", "selector", *(kind for kind, _ in names)]
    await supervisor.start(
        replace(program, settings={**program.settings, **asked_for(kind, os.environ)})
        for kind, program in zip(kinds, [registry, selector, *nodes], strict=True)
    )

    def join(name: str, key: Key, program: Program | None = None, model_index: int = 0) -> Participant:
        client = Client(key, origin=DEFAULT_ORIGIN, registry=registry.address, selector=selector.address)
        stack.push_async_callback(client.close)
        if program is None:
            return Participant(name, client)
        node = Node(key, address=program.address, node_id=key.id)
        stack.push_async_callback(node.close)
        return Participant(name, client, node, model_index)

    members = [
        join(program.name, Key.load(supervisor.folder(program.name) / "key.pem", lock), program, place)
        for place, program in enumerate(nodes)
    ]
    cast = Cast(
        operator=join("operator", operator),
        creator=join("creator", creator),
        trainers=tuple(members[:trainers]),
        validators=tuple(members[trainers:]),
        registry=registry.address,
        selector=selector.address,
    )
    await supervisor.until_serving()
    return cast


def write_rows(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_dataset(path, rows.x, rows.y, labels=rows.labels)
