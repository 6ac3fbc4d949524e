"""The selector's four services: each method converts, awaits one domain call, and converts."""

from services.runtime.paging import PageTokens
from services.runtime.server import Mount
from services.selector.convert.pool import ArenaDefaults
from services.selector.convert.receipts import ReceiptSigner
from services.selector.draws import Draws
from services.selector.eligibility import Eligibility
from services.selector.odds_estimates import OddsEstimates
from services.selector.pools import Pools
from services.selector.servicers.draw import DrawServicer
from services.selector.servicers.eligibility import EligibilityServicer
from services.selector.servicers.pool import PoolServicer
from services.selector.servicers.stake import StakeServicer
from services.selector.stakes import Stakes
from tiltyard.selector.v1 import draw_pb2_grpc, pool_pb2_grpc, stake_pb2_grpc


def mounts(
    *,
    stakes: Stakes,
    eligibility: Eligibility,
    pools: Pools,
    draws: Draws,
    odds: OddsEstimates,
    defaults: ArenaDefaults,
    tokens: PageTokens,
    receipts: ReceiptSigner,
    selector_key: bytes,
) -> tuple[Mount, ...]:
    """All of the selector's services over its domain."""
    stake = StakeServicer(stakes, tokens)
    eligible = EligibilityServicer(eligibility, defaults)
    pool = PoolServicer(pools, defaults, selector_key)
    draw = DrawServicer(draws, odds, receipts, selector_key)
    return (
        Mount(
            "tiltyard.selector.v1.StakeService",
            lambda server: stake_pb2_grpc.add_StakeServiceServicer_to_server(stake, server),
        ),
        Mount(
            "tiltyard.selector.v1.EligibilityService",
            lambda server: pool_pb2_grpc.add_EligibilityServiceServicer_to_server(eligible, server),
        ),
        Mount(
            "tiltyard.selector.v1.PoolService",
            lambda server: pool_pb2_grpc.add_PoolServiceServicer_to_server(pool, server),
        ),
        Mount(
            "tiltyard.selector.v1.DrawService",
            lambda server: draw_pb2_grpc.add_DrawServiceServicer_to_server(draw, server),
        ),
    )
