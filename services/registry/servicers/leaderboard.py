"""LeaderboardService over the domain's leaderboard."""

from collections.abc import AsyncIterator
from typing import Any

from services.registry.convert import leaderboard as convert
from services.registry.leaderboard import Leaderboard
from services.runtime.names import parse_task
from tiltyard.registry.v1 import leaderboard_pb2, leaderboard_pb2_grpc


class LeaderboardServicer(leaderboard_pb2_grpc.LeaderboardServiceServicer):
    """The ranking of a task's training nodes."""

    def __init__(self, leaderboard: Leaderboard) -> None:
        self._leaderboard = leaderboard

    async def GetLeaderboard(
        self, request: leaderboard_pb2.GetLeaderboardRequest, context: Any
    ) -> leaderboard_pb2.GetLeaderboardResponse:
        ranking = await self._leaderboard.get(parse_task(request.task, "task"))
        return leaderboard_pb2.GetLeaderboardResponse(leaderboard=convert.leaderboard_message(ranking))

    async def WatchLeaderboard(
        self, request: leaderboard_pb2.WatchLeaderboardRequest, context: Any
    ) -> AsyncIterator[leaderboard_pb2.WatchLeaderboardResponse]:
        task = parse_task(request.task, "task")
        async for ranking in self._leaderboard.watch(task, after=convert.face_of(request)):
            yield convert.watched_message(ranking)
