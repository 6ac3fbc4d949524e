"""How a validator hears its registry: over streams that fall silent, from newer ones, by whatever clock."""

import asyncio
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
from validator_registry import ORIGIN, SEALED, Duty, FakeRegistry

from services.runtime.channels import open_peer
from services.validator.peers import RegistryPeer
from tiltyard.identity import Key
from tiltyard.modelspec import Linear, ModelSpec

SPEC = ModelSpec((4,), 2, Linear())
KEY = Key.generate()
LONG_S = 120  # on a busy machine


class LosingRegistry(FakeRegistry):
    """Says nothing over the first stream, as a proxy does that holds it open and has lost the registry."""

    def __init__(self, validator: str) -> None:
        super().__init__(validator)
        self.cursors: list[str] = []

    async def WatchAssignments(self, request, context):
        self.cursors.append(request.cursor)
        if len(self.cursors) == 1:
            await asyncio.Event().wait()
        async for message in super().WatchAssignments(request, context):
            yield message
            if len(self.cursors) == 2:
                await asyncio.Event().wait()


@asynccontextmanager
async def heard(registry: FakeRegistry, *, ahead: timedelta = timedelta(), silence_s: float = LONG_S):
    await registry.start()
    try:
        async with open_peer(registry.address, key=KEY, audience=f"{ORIGIN}/registry") as channel:
            yield RegistryPeer(channel, clock=lambda: datetime.now(UTC) + ahead, silence_s=silence_s)
    finally:
        await registry.stop()


async def test_a_stream_that_says_nothing_is_given_up_for_another_one() -> None:
    registry = LosingRegistry(KEY.id)
    async with heard(registry, silence_s=1.0) as peer, asyncio.timeout(LONG_S), aclosing(peer.watch("")) as watch:
        offered = await registry.offer(b"rows", b"model", SPEC)
        assert (await anext(watch))[0].name == offered
        await registry.change(offered, state=SEALED)
        # The second stream fell silent, too.
        assert (await anext(watch))[0].state == "SEALED"
    assert len(registry.cursors) > 2


async def test_names_of_a_newer_registry_are_passed_over_and_what_follows_is_heard() -> None:
    registry = FakeRegistry(KEY.id)
    known = await registry.offer(b"rows", b"model", SPEC)
    registry.duties["arenas/1"] = Duty("arenas/1", registry.duties[known].order)
    async with heard(registry) as peer, asyncio.timeout(LONG_S), aclosing(peer.watch("")) as watch:
        # The one before it by name has come first.
        assert (await anext(watch))[0].name == known
        await registry.change("arenas/1")
        await registry.change(known, state=SEALED)
        assert [each.name for each in await peer.assignments()] == [known]
        assert (await anext(watch))[0].state == "SEALED"
    assert registry.watches == 1


@pytest.mark.parametrize("ahead", [timedelta(), timedelta(seconds=20), timedelta(hours=-1), timedelta(days=1)])
async def test_a_lease_runs_by_the_clock_of_the_registry(ahead: timedelta) -> None:
    registry = FakeRegistry(KEY.id, lease_s=30.0)
    offered = await registry.offer(b"rows", b"model", SPEC)
    async with heard(registry, ahead=ahead) as peer, asyncio.timeout(LONG_S):
        lease = await peer.accept(offered, bytes(32))
        assert (lease.left_s, await peer.renew(offered, lease.token)) == (30.0, 30.0)


async def test_an_order_with_names_of_a_newer_registry_comes_with_its_refusal() -> None:
    registry = FakeRegistry(KEY.id)
    offered = await registry.offer(b"rows", b"model", SPEC)
    registry.duties[offered].order.dataset = "artifacts/blake3-00"
    async with heard(registry) as peer, asyncio.timeout(LONG_S):
        lease = await peer.accept(offered, bytes(32))
        assert (lease.token, lease.order) == (f"lease of {offered}", None)
        assert "order.dataset" in lease.refusal
