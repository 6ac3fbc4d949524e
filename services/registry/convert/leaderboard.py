"""Rankings in the contract's words."""

import re

from services.registry.convert.times import timestamp
from services.registry.leaderboard import Ranking
from services.runtime import names
from services.runtime.errors import InvalidArgument
from tiltyard.registry.v1 import leaderboard_pb2

_FACE = re.compile(r"[0-9a-f]{1,32}")


def leaderboard_message(ranking: Ranking) -> leaderboard_pb2.Leaderboard:
    """A ranking as it is."""
    return leaderboard_pb2.Leaderboard(
        task=names.format_task(ranking.task),
        entries=[
            leaderboard_pb2.LeaderboardEntry(
                rank=place.rank,
                participant=names.format_participant(place.participant),
                display_name=place.display_name,
                submission=names.format_submission(ranking.task, place.number),
                correct=place.correct,
                total=place.total,
                scored_submissions=place.scored_submissions,
                interval_low=place.interval[0],
                interval_high=place.interval[1],
            )
            for place in ranking.places
        ],
        round=ranking.round,
        final=ranking.final,
        update_time=timestamp(ranking.update_time),
    )


def face_of(request: leaderboard_pb2.WatchLeaderboardRequest) -> str:
    """The face of the ranking last seen, empty for none."""
    if request.cursor and not _FACE.fullmatch(request.cursor):
        raise InvalidArgument.field("cursor", "is not a cursor of this stream")
    return request.cursor


def watched_message(ranking: Ranking) -> leaderboard_pb2.WatchLeaderboardResponse:
    """One message of WatchLeaderboard."""
    return leaderboard_pb2.WatchLeaderboardResponse(leaderboard=leaderboard_message(ranking), cursor=ranking.face)
