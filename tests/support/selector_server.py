"""A whole selector behind a real server, asked as the registry asks it, with a stake for everybody of its world."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path

from services.registry.peers import SelectorPeer
from services.runtime.channels import open_peer
from services.runtime.server import ArenaServer
from services.selector.bootstrap import build
from services.selector.settings import SelectorSettings
from tests.support.registry_world import CREATOR, NODES, VALIDATORS, key_of
from tiltyard.selector.v1 import stake_pb2, stake_pb2_grpc

AUDIENCE = "tiltyard.local/selector"
OPERATOR, REGISTRY = key_of("operator"), key_of("registry")


@asynccontextmanager
async def selecting(folder: Path, clock: Callable[[], datetime]) -> AsyncIterator[SelectorPeer]:
    """A selector with its state in `folder`; everybody has 1000 micros, funded apart."""
    settings = SelectorSettings(
        state_dir=folder / "selector",
        listen="127.0.0.1:0",
        operators=frozenset({OPERATOR.id}),
        services=frozenset({REGISTRY.id}),
        validator_min_stake_micros=100,
        training_node_min_stake_micros=10,
        task_creator_min_stake_micros=100,
    )
    async with AsyncExitStack() as stack:
        selector = await build(settings, clock=clock)
        stack.push_async_callback(selector.close)
        server = ArenaServer(
            settings.listen,
            selector.mounts,
            authenticator=selector.authenticator,
            policy=selector.policy,
            remembered=selector.database,
        )
        await server.start()
        stack.push_async_callback(server.stop, grace_s=0)
        await server.set_serving(True)
        registry = await stack.enter_async_context(open_peer(server.address, key=REGISTRY, audience=AUDIENCE))
        bank = await stack.enter_async_context(open_peer(server.address, key=OPERATOR, audience=AUDIENCE))
        for index, key in enumerate([CREATOR, *NODES, *VALIDATORS]):
            await stake_pb2_grpc.StakeServiceStub(bank).Deposit(
                stake_pb2.DepositRequest(
                    participant=f"participants/{key.id}",
                    amount_micros=1000,
                    reference=f"deposit {index}",
                    funding_account=f"account {index}",
                )
            )
        yield SelectorPeer(registry)
