"""Wires the training node once: from settings to servicers that are ready to be mounted."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from services.runtime.auth import AccessPolicy, Authenticator, Role, utc_now
from services.runtime.database import Database
from services.runtime.paging import PageTokens, load_secret
from services.runtime.server import Background, Mount
from services.trainer.bases import BaseModels
from services.trainer.devices import find_devices
from services.trainer.judges import Judges
from services.trainer.keeping import OldTrainings
from services.trainer.live import LiveTrainings
from services.trainer.localdata import DataFolder
from services.trainer.peers import NoRegistry, RegistryPeer
from services.trainer.runner import ChildProcesses
from services.trainer.runs import Runs
from services.trainer.servicers import inference, training
from services.trainer.servicers.inference import TrainedModels
from services.trainer.settings import TrainerSettings
from services.trainer.steadyclock import SteadyClock
from services.trainer.store import SqlTrainingStore
from services.trainer.trainings import Trainings
from tiltyard.client import Client
from tiltyard.identity import Key

_OPERATOR = frozenset({Role.OPERATOR})

POLICY = AccessPolicy(
    {
        f"/{training.SERVICE}/*": _OPERATOR,
        f"/{inference.SERVICE}/*": _OPERATOR,
        **{f"/{inference.SERVICE}/{method}": frozenset({Role.PARTICIPANT}) for method in inference.FOR_JUDGES},
    }
)
"""A node obeys its own key and its operators; its own key is made one of them. Its models answer validators, too, of
whom `judges.Judges` lets some through."""


@dataclass(frozen=True)
class Trainer:
    """A training node that can be served."""

    mounts: tuple[Mount, ...]
    authenticator: Authenticator
    policy: AccessPolicy
    database: Database
    key: Key
    background: tuple[Background, ...]
    on_close: tuple[Background, ...]


async def build(settings: TrainerSettings, *, clock: Callable[[], datetime] = utc_now) -> Trainer:
    """Opens the state and puts everything together. Raises NoSuchDevice for a device that is not here."""
    devices = await find_devices(settings.device)
    # Absolute: the workers of Ray Train have working directories of their own.
    state, data_dir = settings.state_dir.absolute(), settings.data_dir.absolute()
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    data_dir.mkdir(parents=True, exist_ok=True)
    folder, bases = state / "trainings", state / "bases"
    folder.mkdir(mode=0o700, exist_ok=True)
    key = Key.load_or_create(settings.key_file, settings.key_lock)
    migrations = "services.trainer.migrations"
    database = await asyncio.to_thread(Database.open, settings.database_url, migrations=migrations, clock=clock)
    client = (
        Client(key, origin=settings.origin, registry=settings.registry, tls=settings.channel_tls)
        if settings.registry
        else None
    )
    registry = RegistryPeer(client, runs=folder) if client else NoRegistry()
    store, live = SqlTrainingStore(database), LiveTrainings()
    data = DataFolder(data_dir, packed_bytes=settings.packed_bytes)
    await asyncio.to_thread(data.tidy)
    models = TrainedModels(
        runs=folder,
        device=devices[0],
        memory_bytes=settings.model_memory_bytes,
        judges=Judges(store, registry, clock),
    )
    runs = Runs(
        store=store,
        live=live,
        children=ChildProcesses(folder=folder, bases=bases, data=data, threads=settings.threads),
        submitter=registry,
        bases=BaseModels(bases, registry),
        devices=devices,
        runs_per_device=settings.max_runs,
        on_model=models.add,
        clock=clock,
    )
    trainings = Trainings(
        store=store,
        live=live,
        queue=runs,
        datasets=data,
        tasks=registry,
        new_id=lambda: secrets.token_hex(8),
        clock=clock,
    )

    steady = SteadyClock(state / "clock.json", clock)
    old = OldTrainings(folder, store, keep=settings.keep, forget=models.forget, clock=steady.now)

    async def close() -> None:
        await models.close()
        if client is not None:
            await client.close()
        await database.close()

    return Trainer(
        mounts=(
            training.mount(trainings, PageTokens(load_secret(state / "pages.key"))),
            models.mount(),
        ),
        authenticator=Authenticator({key.id}, settings.operators | {key.id}, settings.services, clock),
        policy=POLICY,
        database=database,
        key=key,
        background=(runs.run, old.run),
        on_close=(close,),
    )
