"""Wires the selector once: from settings to servicers that are ready to be mounted."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from services.runtime.auth import AccessPolicy, Authenticator, Role, utc_now
from services.runtime.database import Database
from services.runtime.errors import FailedPrecondition
from services.runtime.paging import PageTokens, load_secret
from services.runtime.server import Mount
from services.selector import servicers
from services.selector.convert.pool import ArenaDefaults
from services.selector.convert.receipts import ReceiptSigner
from services.selector.draws import Draws
from services.selector.eligibility import Eligibility
from services.selector.odds_estimates import OddsEstimates
from services.selector.pool_trees import PoolTrees
from services.selector.pools import Pools
from services.selector.settings import SelectorSettings
from services.selector.stakes import Stakes
from services.selector.store import SqlStore
from tiltyard.bls import BlsKey

_SERVICE = frozenset({Role.SERVICE})
_OPERATOR = frozenset({Role.OPERATOR})

POLICY = AccessPolicy(
    {
        "/tiltyard.selector.v1.StakeService/Deposit": _OPERATOR,
        "/tiltyard.selector.v1.StakeService/Slash": _SERVICE,
        "/tiltyard.selector.v1.EligibilityService/*": _SERVICE,
        "/tiltyard.selector.v1.PoolService/*": _SERVICE,
        "/tiltyard.selector.v1.DrawService/DrawValidators": _SERVICE,
        "/tiltyard.selector.v1.DrawService/ExtendDraw": _SERVICE,
        "/tiltyard.selector.v1.DrawService/SettleAssignment": _SERVICE,
    }
)
"""Stakes, events, draws and odds are open to every participant: the record log shows them all the same."""


@dataclass(frozen=True)
class Selector:
    """A selector that can be served: in a process of its own, or in one with others."""

    mounts: tuple[Mount, ...]
    authenticator: Authenticator
    policy: AccessPolicy
    database: Database
    receipts: ReceiptSigner
    public_key: bytes
    """The BLS key that checks sigmas and receipts, 48 bytes."""

    async def close(self) -> None:
        """Commits what is queued."""
        await self.database.close()
        await self.receipts.close()


async def build(settings: SelectorSettings, *, clock: Callable[[], datetime] = utc_now) -> Selector:
    """Opens the state and puts everything together.

    `clock` is the ledger's. Tokens go by the machine's, as those of their issuers do. Raises FailedPrecondition where
    the key of the draws is gone.
    """
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    migrations = "services.selector.migrations"
    database = await asyncio.to_thread(Database.open, settings.database_url, migrations=migrations, clock=clock)
    store = SqlStore(database)
    key_file = settings.state_dir / "bls.key"
    if not key_file.exists() and await store.read(lambda tx: tx.last_sequence() > 0):
        # What another key signs is checked with the one that the record log names, and taken for a forgery.
        await database.close()
        raise FailedPrecondition(
            "DRAW_KEY_MISSING", f"there is no {key_file}, and a ledger in the database: bring it back from the backup"
        )
    key = BlsKey.load_or_create(key_file, settings.key_lock)
    tokens = PageTokens(load_secret(settings.state_dir / "pages.key"))
    trees = PoolTrees()
    eligibility = Eligibility(store, clock=clock, task_creator_min_stake_micros=settings.task_creator_min_stake_micros)
    receipts = ReceiptSigner(key)
    defaults = ArenaDefaults(settings.validator_min_stake_micros, settings.training_node_min_stake_micros)
    mounts = servicers.mounts(
        stakes=Stakes(store, trees, clock=clock, unbonding_time=settings.unbonding_time),
        eligibility=eligibility,
        pools=Pools(store, trees, eligibility, clock=clock),
        draws=Draws(store, trees, receipts, clock=clock),
        odds=OddsEstimates(store, clock=clock),
        defaults=defaults,
        tokens=tokens,
        receipts=receipts,
        selector_key=key.public_key,
    )
    authenticator = Authenticator({f"{settings.origin}/selector"}, settings.operators, settings.services)
    return Selector(mounts, authenticator, POLICY, database, receipts, key.public_key)
