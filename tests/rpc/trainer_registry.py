"""A registry for one training node: one task, one member, and whatever that member hands in or fetches."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from services.runtime.errors import ArenaError, NotFound, Unavailable
from services.runtime.server import ArenaServer, Mount
from services.trainer.bootstrap import build
from services.trainer.settings import TrainerSettings
from tiltyard.client import ClientError, Node
from tiltyard.datasets import write_dataset
from tiltyard.registry.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
    submission_pb2,
    submission_pb2_grpc,
    task_pb2,
    task_pb2_grpc,
)
from tiltyard.statements import open_statement
from tiltyard.trainer.v1 import trainer_pb2 as pb
from tiltyard.type.v1 import envelope_pb2, model_pb2, participation_pb2
from tiltyard.type.v1 import task_pb2 as task_types_pb2

MODELS = [
    model_pb2.ModelSpec(input_shape=[2], outputs=2, linear=model_pb2.Linear()),
    model_pb2.ModelSpec(input_shape=[2], outputs=2, mlp=model_pb2.Mlp(hidden=[8])),
]


class FakeRegistry(
    task_pb2_grpc.TaskServiceServicer,
    membership_pb2_grpc.MembershipServiceServicer,
    submission_pb2_grpc.SubmissionServiceServicer,
    artifact_pb2_grpc.ArtifactServiceServicer,
):
    """One task, one member, and whatever that member hands in."""

    def __init__(self, member: str) -> None:
        self.member = member
        self.address = ""
        self.state = task_types_pb2.TASK_STATE_OPEN
        self.commits: dict[str, envelope_pb2.CommitStatement] = {}
        self.revealed: list[envelope_pb2.RevealStatement] = []
        self.content = b""
        self.base_model = b""
        self.hold_downloads = False
        self.download_asked = asyncio.Event()
        self.refuse_commits: ArenaError | None = None
        self.hold_uploads = False
        self.upload_asked = asyncio.Event()

    async def GetTask(self, request: Any, context: Any) -> task_pb2.GetTaskResponse:
        if request.name != "tasks/xor":
            raise NotFound("TASK_NOT_FOUND", "there is no such task")
        config = task_types_pb2.TaskConfig(models=MODELS)
        if self.base_model:
            config = task_types_pb2.TaskConfig(models=MODELS[1:], base_model=self.base_model_name)
        return task_pb2.GetTaskResponse(task=task_pb2.Task(name=request.name, state=self.state, config=config))

    async def ListMembers(self, request: Any, context: Any) -> membership_pb2.ListMembersResponse:
        member = membership_pb2.Member(
            name=f"{request.parent}/members/{self.member}",
            role=participation_pb2.ROLE_TRAINING_NODE,
            state=participation_pb2.MEMBERSHIP_STATE_ACTIVE,
        )
        return membership_pb2.ListMembersResponse(members=[member])

    async def CommitSubmission(self, request: Any, context: Any) -> submission_pb2.CommitSubmissionResponse:
        if self.refuse_commits is not None:
            raise self.refuse_commits
        statement, signer = open_statement(request.statement, envelope_pb2.CommitStatement)
        assert statement.participant == f"participants/{signer}"
        self.commits.setdefault(request.request_id, statement)
        number = list(self.commits).index(request.request_id) + 1
        submission = submission_pb2.Submission(name=f"tasks/xor/submissions/{number}")
        return submission_pb2.CommitSubmissionResponse(submission=submission)

    async def RevealSubmission(self, request: Any, context: Any) -> submission_pb2.RevealSubmissionResponse:
        statement, _ = open_statement(request.statement, envelope_pb2.RevealStatement)
        self.revealed.append(statement)
        return submission_pb2.RevealSubmissionResponse()

    async def GetUpload(self, request: Any, context: Any) -> artifact_pb2.GetUploadResponse:
        self.upload_asked.set()
        if self.hold_uploads:
            raise Unavailable("AWAY", "the registry is away")
        return artifact_pb2.GetUploadResponse()

    async def UploadArtifact(self, requests: Any, context: Any) -> artifact_pb2.UploadArtifactResponse:
        self.content = b"".join([message.chunk async for message in requests])
        return artifact_pb2.UploadArtifactResponse()

    @property
    def base_model_name(self) -> str:
        return f"artifacts/{hashlib.sha256(self.base_model).hexdigest()}"

    async def GetArtifact(self, request: Any, context: Any) -> artifact_pb2.GetArtifactResponse:
        self.download_asked.set()
        if self.hold_downloads:
            raise Unavailable("AWAY", "the registry is away")
        assert request.name == self.base_model_name
        artifact = artifact_pb2.Artifact(name=request.name, size_bytes=len(self.base_model))
        return artifact_pb2.GetArtifactResponse(artifact=artifact)

    async def DownloadArtifact(self, request: Any, context: Any) -> AsyncIterator[Any]:
        assert request.name == self.base_model_name
        yield artifact_pb2.DownloadArtifactResponse(chunk=self.base_model[request.offset :])

    def mounts(self) -> list[Mount]:
        return [
            Mount(
                "tiltyard.registry.v1.TaskService",
                lambda server: task_pb2_grpc.add_TaskServiceServicer_to_server(self, server),
            ),
            Mount(
                "tiltyard.registry.v1.MembershipService",
                lambda server: membership_pb2_grpc.add_MembershipServiceServicer_to_server(self, server),
            ),
            Mount(
                "tiltyard.registry.v1.SubmissionService",
                lambda server: submission_pb2_grpc.add_SubmissionServiceServicer_to_server(self, server),
            ),
            Mount(
                "tiltyard.registry.v1.ArtifactService",
                lambda server: artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(self, server),
            ),
        ]


@asynccontextmanager
async def registry_of(member: str) -> AsyncIterator[FakeRegistry]:
    """Serves a fake registry with this one member."""
    fake = FakeRegistry(member)
    async with ArenaServer("127.0.0.1:0", fake.mounts(), authenticator=None) as server:
        fake.address = server.address
        yield fake


@asynccontextmanager
async def served(state: Path, registry: str) -> AsyncIterator[Node]:
    """A training node in this process, told of a registry at an address, and a client with the node's own key."""
    (state / "data").mkdir(exist_ok=True)
    x = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    write_dataset(state / "data" / "xor.safetensors", x, (x[:, 0] * x[:, 1] > 0).astype(np.int64))
    settings = TrainerSettings(
        state_dir=state, listen="127.0.0.1:0", device="cpu", training_threads=1, registry=registry
    )
    trainer = await build(settings)
    server = ArenaServer(
        settings.listen,
        trainer.mounts,
        authenticator=trainer.authenticator,
        policy=trainer.policy,
        remembered=trainer.database,
    )
    tasks = [asyncio.ensure_future(job()) for job in trainer.background]
    try:
        async with server, Node(trainer.key, address=server.address, node_id=trainer.key.id) as node:
            yield node
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for close in trainer.on_close:
            await close()


def request(**fields: Any) -> pb.StartTrainingRequest:
    asked = {"task": "tasks/xor", "model_index": 1, "submit": True, "config": pb.TrainingConfig(epochs=3)}
    return pb.StartTrainingRequest(dataset="xor.safetensors", **(asked | fields))


async def until_ended(node: Node, name: str) -> list[pb.Training]:
    return [message.training async for message in node.trainings.WatchTraining(pb.WatchTrainingRequest(name=name))]


async def refused(call: Any) -> ClientError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return ClientError.of(caught.value)
