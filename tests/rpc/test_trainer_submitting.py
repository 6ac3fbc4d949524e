"""A training node in a task: what it takes from the registry, and how its model gets there."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from services.runtime.errors import ArenaError, FailedPrecondition, NotFound, ResourceExhausted, Unavailable
from services.runtime.server import ArenaServer, Mount
from services.trainer.bootstrap import build
from services.trainer.settings import TrainerSettings
from tiltyard.client import ClientError, Node
from tiltyard.commitments import submission_commitment
from tiltyard.datasets import write_dataset
from tiltyard.identity import Key
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
        self.refuse_commits: ArenaError | None = None
        self.hold_uploads = False
        self.upload_asked = asyncio.Event()

    async def GetTask(self, request: Any, context: Any) -> task_pb2.GetTaskResponse:
        if request.name != "tasks/xor":
            raise NotFound("TASK_NOT_FOUND", "there is no such task")
        config = task_types_pb2.TaskConfig(models=MODELS)
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


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return Key.load_or_create(tmp_path / "key.pem")


@pytest.fixture
async def registry(key: Key) -> AsyncIterator[FakeRegistry]:
    fake = FakeRegistry(key.id)
    async with ArenaServer("127.0.0.1:0", fake.mounts(), authenticator=None) as server:
        fake.address = server.address
        yield fake


@asynccontextmanager
async def served(state: Path, address: str) -> AsyncIterator[Node]:
    (state / "data").mkdir(exist_ok=True)
    x = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    write_dataset(state / "data" / "xor.safetensors", x, (x[:, 0] * x[:, 1] > 0).astype(np.int64))
    settings = TrainerSettings(
        state_dir=state, listen="127.0.0.1:0", device="cpu", training_threads=1, registry=address
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


async def test_a_trained_model_is_committed_uploaded_and_revealed(
    tmp_path: Path, key: Key, registry: FakeRegistry
) -> None:
    async with served(tmp_path, registry.address) as node:
        started = (await node.trainings.StartTraining(request())).training
        assert started.model.WhichOneof("architecture") == "mlp"
        seen = await until_ended(node, started.name)
    done = seen[-1]
    assert done.state == pb.TRAINING_STATE_SUCCEEDED
    assert pb.TRAINING_STATE_SUBMITTING in [training.state for training in seen]
    assert done.submission == "tasks/xor/submissions/1"
    assert hashlib.sha256(registry.content).digest() == done.model_digest
    [statement], [opened] = registry.commits.values(), registry.revealed
    assert opened.model_index == 1
    assert statement.commitment == submission_commitment(
        origin="tiltyard.local",
        task="tasks/xor",
        participant=f"participants/{key.id}",
        model_digest=done.model_digest,
        salt=opened.salt,
    )


async def test_a_submission_goes_on_after_a_restart_and_is_made_once(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.hold_uploads = True
    async with served(tmp_path, registry.address) as node:
        name = (await node.trainings.StartTraining(request())).training.name
        await registry.upload_asked.wait()
        training = (await node.trainings.GetTraining(pb.GetTrainingRequest(name=name))).training
        assert training.state == pb.TRAINING_STATE_SUBMITTING
    assert len(registry.commits) == 1
    registry.hold_uploads = False
    async with served(tmp_path, registry.address) as node:
        done = (await until_ended(node, name))[-1]
    assert done.state == pb.TRAINING_STATE_SUCCEEDED
    assert done.model_digest == training.model_digest
    assert len(registry.commits) == 1
    assert len(registry.revealed) == 1


async def test_a_submission_that_waits_for_the_registry_is_cancelled(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.hold_uploads = True
    async with served(tmp_path, registry.address) as node:
        name = (await node.trainings.StartTraining(request())).training.name
        await registry.upload_asked.wait()
        await node.trainings.CancelTraining(pb.CancelTrainingRequest(name=name))
        assert (await until_ended(node, name))[-1].state == pb.TRAINING_STATE_CANCELLED
    assert not registry.revealed


async def test_a_limit_of_submissions_a_day_is_waited_for(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.refuse_commits = ResourceExhausted("DAILY_LIMIT", "20 submissions today", retry_after_s=1.5)
    async with served(tmp_path, registry.address) as node:
        name = (await node.trainings.StartTraining(request())).training.name
        async for message in node.trainings.WatchTraining(pb.WatchTrainingRequest(name=name)):
            if message.training.warnings and registry.refuse_commits is not None:
                assert message.training.state == pb.TRAINING_STATE_SUBMITTING
                registry.refuse_commits = None
        done = message.training
    assert done.state == pb.TRAINING_STATE_SUCCEEDED
    assert done.submission == "tasks/xor/submissions/1"
    assert "waits" in done.warnings[0]
    assert "20 submissions today" in done.warnings[0]


async def test_what_the_registry_refuses_fails_the_training_with_its_reason(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.refuse_commits = FailedPrecondition("TASK_NOT_OPEN", "the task has closed")
    async with served(tmp_path, registry.address) as node:
        name = (await node.trainings.StartTraining(request())).training.name
        done = (await until_ended(node, name))[-1]
    assert done.state == pb.TRAINING_STATE_FAILED
    assert "the task has closed (TASK_NOT_OPEN)" in done.error
    # The work is not lost: the model can be submitted by hand.
    assert (tmp_path / "trainings" / name.removeprefix("trainings/") / "model.safetensors").exists()


async def test_a_training_for_a_task_is_checked_before_it_starts(tmp_path: Path, registry: FakeRegistry) -> None:
    async with served(tmp_path, registry.address) as node:
        start = node.trainings.StartTraining
        error = await refused(start(request(task="tasks/none")))
        assert error.code is grpc.StatusCode.NOT_FOUND
        error = await refused(start(request(model_index=2)))
        assert (error.code, error.violations[0].field) == (grpc.StatusCode.INVALID_ARGUMENT, "model_index")
        error = await refused(start(request(model=MODELS[0])))
        assert error.violations[0].field == "model"
        registry.member = "0" * 40
        error = await refused(start(request()))
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_A_TRAINING_NODE")
        registry.state = task_types_pb2.TASK_STATE_CLOSED
        error = await refused(start(request()))
        assert error.reason == "TASK_NOT_OPEN"
        assert not (await node.trainings.ListTrainings(pb.ListTrainingsRequest())).trainings


async def test_a_node_without_a_registry_says_so(tmp_path: Path) -> None:
    async with served(tmp_path, "") as node:
        error = await refused(node.trainings.StartTraining(request()))
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_REGISTRY")
