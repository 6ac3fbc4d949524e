"""EligibilityService."""

from typing import Any

from services.selector.convert import pool as convert
from services.selector.convert.pool import ArenaDefaults
from services.selector.eligibility import Eligibility
from tiltyard.selector.v1 import pool_pb2 as pb
from tiltyard.selector.v1 import pool_pb2_grpc


class EligibilityServicer(pool_pb2_grpc.EligibilityServiceServicer):
    """tiltyard.selector.v1.EligibilityService."""

    def __init__(self, eligibility: Eligibility, defaults: ArenaDefaults) -> None:
        self._eligibility = eligibility
        self._defaults = defaults

    async def CheckEligibility(self, request: pb.CheckEligibilityRequest, context: Any) -> pb.CheckEligibilityResponse:
        """Weighs the registry's facts and the selector's stake, without side effects."""
        policy = convert.policy(request.policy, self._defaults)
        verdict = await self._eligibility.check(convert.applicant(request), policy)
        return convert.check_eligibility_response(verdict, policy)
