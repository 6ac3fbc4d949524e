"""What a validator asks a real registry before it removes a task's hidden datasets from its disk."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.registry.states import TaskState
from services.runtime.channels import open_peer
from services.runtime.errors import NotFound
from services.validator.peers import RegistryPeer
from tests.support.registry_server import ORIGIN, RegistryServer, digest_of
from tests.support.registry_world import NODES, VALIDATORS
from tests.support.told_arena import ToldArena, dataset_of, model_of
from tiltyard.registry.v1 import task_pb2


async def test_both_datasets_are_needed_until_the_task_is_final_or_cancelled(tmp_path: Path) -> None:
    server = RegistryServer(tmp_path)
    await server.start()
    try:
        arena = ToldArena(server)
        await arena.gather()
        holdout = dataset_of(tmp_path, "holdout")
        await arena.create("judged", holdout=digest_of(holdout))
        hidden = dataset_of(tmp_path, "judged")
        digests = {digest_of(data).sha256.hex() for data in (hidden, holdout)}
        channel = open_peer(server.server.address, key=VALIDATORS[0], audience=f"{ORIGIN}/registry")
        async with channel:
            peer = RegistryPeer(channel, clock=lambda: datetime.now(UTC))
            found = await peer.datasets("judged")
            assert (found.digests, found.ended) == (digests, False)
            number = await arena.submit("judged", NODES[0], model_of("judged"))
            await arena.judge("judged", number, 30, 30, 30)
            await arena.ended("judged", number)
            await arena.close("judged")
            # The holdout is still to be judged on.
            assert not (await peer.datasets("judged")).ended
            await server.upload(arena.creator, holdout, task="tasks/judged")
            await arena.creator.tasks.PublishHoldout(task_pb2.PublishHoldoutRequest(name="tasks/judged"))
            await arena.judge("judged", number, 20, 20, 20, round_=2)
            await arena.over("judged")
            found = await peer.datasets("judged")
            assert (found.digests, found.ended) == (digests, True)
            await arena.create("given-up")
            await arena.creator.tasks.CancelTask(task_pb2.CancelTaskRequest(name="tasks/given-up"))
            await arena.over("given-up", TaskState.CANCELLED)
            assert (await peer.datasets("given-up")).ended
            with pytest.raises(NotFound):
                await peer.datasets("unheard-of")
    finally:
        await server.stop()
