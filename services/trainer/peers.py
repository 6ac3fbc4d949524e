"""The registry as a training node sees it: what a task asks for, and where a model is handed in."""

from pathlib import Path

import grpc

from services.runtime.errors import FailedPrecondition, Unavailable
from services.runtime.names import (
    format_artifact,
    format_member,
    format_participant,
    format_task,
    parse_artifact,
    parse_submission,
)
from services.runtime.rpc_errors import from_rpc_error
from services.trainer import runfolder
from services.trainer.convert import loss_from_proto
from services.trainer.training import Training
from services.trainer.trainings import TaskFacts
from tiltyard.client import Client, pages
from tiltyard.registry.v1 import assignment_pb2, membership_pb2, task_pb2
from tiltyard.submitting import JournalMismatch, submit_model
from tiltyard.transfers import DigestMismatch, download
from tiltyard.type.v1 import evaluation_pb2, participation_pb2
from tiltyard.type.v1 import task_pb2 as task_types_pb2
from tiltyard.wire import model_spec_from_proto

_MEMBER_STATES = (participation_pb2.MEMBERSHIP_STATE_ACTIVE, participation_pb2.MEMBERSHIP_STATE_PAUSED)
# Who waits for longer is told of it, and goes on with what has come so far.
_DOWNLOAD_PATIENCE_S = 1.0


class RegistryPeer:
    """services.trainer's TaskReader, Submitter and ArtifactReader over the registry's stubs."""

    def __init__(self, client: Client, *, runs: Path) -> None:
        self._client = client
        self._runs = runs

    async def task(self, task: str) -> TaskFacts:
        """Raises NotFound for an unknown task, Unavailable when the registry cannot be asked."""
        try:
            answer = await self._client.tasks.GetTask(task_pb2.GetTaskRequest(name=format_task(task)))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        config = answer.task.config
        return TaskFacts(
            models=tuple(model_spec_from_proto(model) for model in config.models),
            loss=loss_from_proto(config.loss, "task"),
            open=answer.task.state == task_types_pb2.TASK_STATE_OPEN,
            base_model=parse_artifact(config.base_model, "base_model") if config.base_model else "",
        )

    async def check_membership(self, task: str) -> None:
        """Raises FailedPrecondition (NOT_A_TRAINING_NODE) unless this node is a training node of the task."""
        name = format_member(task, self._client.key.id)
        request = membership_pb2.ListMembersRequest(parent=format_task(task), page_size=1000)
        try:
            async for page in pages(self._client.memberships.ListMembers, request):
                for member in page.members:
                    if (
                        member.name == name
                        and member.role == participation_pb2.ROLE_TRAINING_NODE
                        and member.state in _MEMBER_STATES
                    ):
                        return
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        raise FailedPrecondition(
            "NOT_A_TRAINING_NODE", f"this node is not a training node of {format_task(task)}", task=task
        )

    async def is_judging(self, validator: str, submission: str) -> bool:
        """Whether a participant holds a lease on a submission of a task that lets nodes' endpoints be asked.

        Raises Unavailable when the registry cannot be asked.
        """
        task = format_task(parse_submission(submission)[0])
        request = assignment_pb2.ListAssignmentsRequest(parent=submission, page_size=1000)
        try:
            config = (await self._client.tasks.GetTask(task_pb2.GetTaskRequest(name=task))).task.config
            if not config.allow_node_endpoint:
                return False
            async for page in pages(self._client.assignments.ListAssignments, request):
                for each in page.assignments:
                    leased = each.state == evaluation_pb2.ASSIGNMENT_STATE_ACCEPTED
                    if leased and each.validator == format_participant(validator):
                        return True
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return False

    async def submit(self, training: Training) -> str:
        """Commits, uploads and reveals the model, or goes on where that stopped; the submission's name."""
        folder = self._runs / training.id
        try:
            return await submit_model(
                self._client,
                task=format_task(training.task),
                model=folder / runfolder.MODEL_FILE,
                model_index=training.model_index,
                journal=folder / runfolder.JOURNAL_FILE,
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except FileNotFoundError as error:
            raise FailedPrecondition("MODEL_NOT_SUBMITTED", f"the model is gone: {error}") from error
        except JournalMismatch as error:
            raise FailedPrecondition("MODEL_NOT_SUBMITTED", str(error)) from error

    async def download(self, sha256: str, destination: Path) -> None:
        """Puts an artifact there, whole or not at all. Raises OSError, Unavailable, and what the registry refuses."""
        try:
            await download(
                self._client.artifacts, format_artifact(sha256), destination, patience_s=_DOWNLOAD_PATIENCE_S
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        except DigestMismatch as error:
            raise Unavailable("BASE_MODEL_DAMAGED", str(error)) from error


class NoRegistry:
    """The registry of a node that was told of none."""

    async def task(self, task: str) -> TaskFacts:
        """Raises FailedPrecondition."""
        raise FailedPrecondition("NO_REGISTRY", "this node knows no registry: set TILTYARD_REGISTRY", task=task)

    async def check_membership(self, task: str) -> None:
        """Raises FailedPrecondition."""
        await self.task(task)

    async def is_judging(self, validator: str, submission: str) -> bool:
        """False: nobody was drawn."""
        return False

    async def submit(self, training: Training) -> str:
        """Raises Unavailable: the training was started when the node knew a registry."""
        raise Unavailable("NO_REGISTRY", "this node knows no registry: set TILTYARD_REGISTRY", task=training.task)

    async def download(self, sha256: str, destination: Path) -> None:
        """Raises Unavailable: the training was started when the node knew a registry."""
        raise Unavailable("NO_REGISTRY", "this node knows no registry: set TILTYARD_REGISTRY")
