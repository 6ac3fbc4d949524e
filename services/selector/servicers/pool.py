"""PoolService."""

from typing import Any

from services.runtime import names
from services.selector.convert import pool as convert
from services.selector.convert.pool import ArenaDefaults
from services.selector.pools import Pools
from tiltyard.selector.v1 import pool_pb2 as pb
from tiltyard.selector.v1 import pool_pb2_grpc


class PoolServicer(pool_pb2_grpc.PoolServiceServicer):
    """tiltyard.selector.v1.PoolService."""

    def __init__(self, pools: Pools, defaults: ArenaDefaults, selector_key: bytes) -> None:
        self._pools = pools
        self._defaults = defaults
        self._selector_key = selector_key

    async def OpenPool(self, request: pb.OpenPoolRequest, context: Any) -> pb.OpenPoolResponse:
        """Starts a task's pool."""
        opening = convert.opening(request, self._defaults)
        pool = await self._pools.open(
            task=opening.task, policy=opening.policy, open_time=opening.open_time, creator=opening.creator
        )
        return convert.open_pool_response(pool.policy, self._selector_key)

    async def AddCandidate(self, request: pb.AddCandidateRequest, context: Any) -> pb.AddCandidateResponse:
        """Checks the eligibility and locks the stake."""
        admission = await self._pools.add(convert.applicant(request), owner=convert.owner(request))
        return convert.add_candidate_response(admission)

    async def RemoveCandidate(self, request: pb.RemoveCandidateRequest, context: Any) -> pb.RemoveCandidateResponse:
        """Unlocks the stake of one candidate."""
        task, participant = convert.member(request)
        unlocked_micros = await self._pools.remove(task=task, participant=participant)
        return pb.RemoveCandidateResponse(unlocked_micros=unlocked_micros)

    async def MergeOwnerGroups(self, request: pb.MergeOwnerGroupsRequest, context: Any) -> pb.MergeOwnerGroupsResponse:
        """Makes the owner groups of a participant and its owner one."""
        participant, owner = convert.merging(request)
        owner_group = await self._pools.merge_owner_groups(participant, owner=owner)
        return pb.MergeOwnerGroupsResponse(owner_group=owner_group)

    async def ClosePool(self, request: pb.ClosePoolRequest, context: Any) -> pb.ClosePoolResponse:
        """Unlocks all stakes."""
        await self._pools.close(names.parse_task(request.task, "task"))
        return pb.ClosePoolResponse()
