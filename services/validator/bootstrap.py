"""Puts a validator together from its settings."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.modelserver.reading import library_around
from services.modelserver.spawn import Nursery
from services.runtime.auth import AccessPolicy, Authenticator, Role, utc_now
from services.runtime.channels import open_peer
from services.runtime.database import Database
from services.runtime.paging import load_secret
from services.runtime.server import Background, Mount
from services.runtime.state_folder import own_state_folder
from services.validator import migrations
from services.validator.cache import Cache
from services.validator.children import NurseryAttempts
from services.validator.convert import RunPages
from services.validator.duties import Means
from services.validator.endpoints import EndpointAttempts
from services.validator.fleet import parse_servers
from services.validator.leavings import Leavings
from services.validator.nodes import NodeEndpoints, parse_reach
from services.validator.peers import RegistryPeer
from services.validator.scheduler import Scheduler
from services.validator.servicers.validation import SERVICE, mount
from services.validator.settings import ValidatorSettings
from services.validator.signing import KeyNotary
from services.validator.slots import FairSlots
from services.validator.store import DatabaseRunStore
from services.validator.validation import Validation
from tiltyard.identity import Key

# Leases held for each evaluation slot. An offer that waits for its turn expires after a minute and is held against us;
# a lease that waits costs a renewal now and then. Whose turn it is, is decided where evaluations begin.
_LEASES_PER_SLOT = 1024


@dataclass(frozen=True)
class Validator:
    """A validator that is ready to be served."""

    key: Key
    mounts: Sequence[Mount]
    authenticator: Authenticator
    policy: AccessPolicy
    database: Database
    background: Sequence[Background]
    on_close: Sequence[Background]


async def build(settings: ValidatorSettings, *, on_drained: Callable[[], None]) -> Validator:
    """Opens what a validator needs. `on_drained` is called once when a drain is over.

    Exits with status 2 when another process has the state folder, or where model servers would read it.
    """
    if not settings.model_servers.strip():
        _keep_from_models(settings)
    lock = own_state_folder(settings.state_dir, settings.service)
    key = Key.load_or_create(settings.key_file, settings.key_lock)
    database = Database.open(settings.database_url, migrations=migrations)
    store = DatabaseRunStore(database)
    channel = open_peer(settings.registry, key=key, audience=f"{settings.origin}/registry", tls=settings.channel_tls)
    attempts, start_attempts, close_attempts = _attempts(settings, key)
    registry = RegistryPeer(channel, clock=utc_now)
    nodes = NodeEndpoints(
        parse_reach(settings.node_endpoints),
        key=key,
        concurrency=settings.concurrency,
        tls=settings.channel_tls,
    )
    cache = Cache(settings.state_dir / "cache", max_bytes=settings.cache_bytes)
    means = Means(
        registry=registry,
        notary=KeyNotary(key, settings.origin),
        store=store,
        cache=cache,
        attempts=attempts,
        nodes=nodes,
        leases=FairSlots(_LEASES_PER_SLOT * settings.concurrency),
        evaluations=FairSlots(settings.concurrency),
        lease_holder=load_secret(settings.state_dir / "lease_holder"),
        clock=utc_now,
    )
    scheduler = Scheduler(means, stop_after=settings.stop_after, on_drained=on_drained)
    validation = Validation(key.id, scheduler, store, isolation=attempts.isolation)

    async def close() -> None:
        await close_attempts()
        nodes.close()
        await channel.close()
        await database.close()
        os.close(lock)

    return Validator(
        key=key,
        mounts=[mount(validation, RunPages(load_secret(settings.state_dir / "pages")))],
        authenticator=Authenticator({key.id}, operators=settings.operators | {key.id}, clock=utc_now),
        policy=AccessPolicy({f"/{SERVICE}/*": frozenset({Role.OPERATOR})}),
        database=database,
        background=[start_attempts, scheduler.run, Leavings(registry, store, cache).run],
        on_close=[close],
    )


def _keep_from_models(settings: ValidatorSettings) -> None:
    """Exits with status 2 where the key or the datasets lie among the libraries that every own model server reads."""
    for variable, path in (("STATE_DIR", settings.state_dir), ("KEY_FILE", settings.key_file)):
        if library := library_around(path):
            sys.stderr.write(f"TILTYARD_{variable}: {path} lies in {library}, which model servers may read\n")
            raise SystemExit(2)


def _attempts(
    settings: ValidatorSettings, key: Key
) -> tuple[NurseryAttempts | EndpointAttempts, Background, Background]:
    """Where models run, what starts that, and what ends it."""
    servers = parse_servers(settings.model_servers)
    if servers:
        assert settings.model_share is not None
        elsewhere = EndpointAttempts(
            servers,
            share=settings.model_share,
            template=settings.model_template,
            key=key,
            concurrency=settings.concurrency,
            tls=settings.channel_tls,
        )

        async def close_elsewhere() -> None:
            elsewhere.close()

        return elsewhere, elsewhere.tidy, close_elsewhere
    nursery = Nursery()
    own = NurseryAttempts(
        nursery,
        folder=settings.state_dir / "children",
        threads=max(1, (os.cpu_count() or 1) // settings.concurrency),
        concurrency=settings.concurrency,
    )

    async def close() -> None:
        await nursery.close()
        own.close()

    return own, nursery.start, close
