"""The registry's nine services: each method converts, awaits one domain call, and converts."""

from services.registry.servicers.artifacts import ArtifactServicer
from services.registry.servicers.assignments import AssignmentServicer
from services.registry.servicers.evaluations import EvaluationServicer
from services.registry.servicers.leaderboard import LeaderboardServicer
from services.registry.servicers.log import LogServicer
from services.registry.servicers.memberships import MembershipServicer
from services.registry.servicers.participants import ParticipantServicer
from services.registry.servicers.submissions import SubmissionServicer
from services.registry.servicers.tasks import TaskServicer
from services.runtime.server import Mount
from tiltyard import chunks
from tiltyard.registry.v1 import (
    assignment_pb2_grpc,
    evaluation_pb2_grpc,
    leaderboard_pb2_grpc,
    log_pb2_grpc,
    membership_pb2_grpc,
    participant_pb2_grpc,
    submission_pb2_grpc,
    task_pb2_grpc,
)

_PACKAGE = "tiltyard.registry.v1"


def mounts(
    *,
    participants: ParticipantServicer,
    tasks: TaskServicer,
    memberships: MembershipServicer,
    submissions: SubmissionServicer,
    assignments: AssignmentServicer,
    evaluations: EvaluationServicer,
    leaderboard: LeaderboardServicer,
    artifacts: ArtifactServicer,
    log: LogServicer,
) -> tuple[Mount, ...]:
    """All of the registry's services, ready to be served."""
    return (
        Mount(
            f"{_PACKAGE}.ParticipantService",
            lambda server: participant_pb2_grpc.add_ParticipantServiceServicer_to_server(participants, server),
        ),
        Mount(f"{_PACKAGE}.TaskService", lambda server: task_pb2_grpc.add_TaskServiceServicer_to_server(tasks, server)),
        Mount(
            f"{_PACKAGE}.MembershipService",
            lambda server: membership_pb2_grpc.add_MembershipServiceServicer_to_server(memberships, server),
        ),
        Mount(
            f"{_PACKAGE}.SubmissionService",
            lambda server: submission_pb2_grpc.add_SubmissionServiceServicer_to_server(submissions, server),
        ),
        Mount(
            f"{_PACKAGE}.AssignmentService",
            lambda server: assignment_pb2_grpc.add_AssignmentServiceServicer_to_server(assignments, server),
        ),
        Mount(
            f"{_PACKAGE}.EvaluationService",
            lambda server: evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server(evaluations, server),
        ),
        Mount(
            f"{_PACKAGE}.LeaderboardService",
            lambda server: leaderboard_pb2_grpc.add_LeaderboardServiceServicer_to_server(leaderboard, server),
        ),
        Mount(f"{_PACKAGE}.ArtifactService", lambda server: chunks.add_to_server(artifacts, server)),
        Mount(f"{_PACKAGE}.LogService", lambda server: log_pb2_grpc.add_LogServiceServicer_to_server(log, server)),
    )
