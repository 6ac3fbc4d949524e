"""Tasks that start from a model: who hands it in, what it must be, who may read it."""

from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.numpy import save

from tests.support.registry_server import (
    ORIGIN,
    RegistryServer,
    artifact_name,
    config_of,
    dataset_bytes,
    digest_of,
    refused,
    uploading,
)
from tiltyard.client import Client
from tiltyard.modelspec import Mlp, ModelSpec, tensor_shapes
from tiltyard.registry.v1.artifact_pb2 import DownloadArtifactRequest, GetArtifactRequest, UploadHeader
from tiltyard.registry.v1.membership_pb2 import PauseMembershipRequest
from tiltyard.registry.v1.participant_pb2 import EndorseParticipantRequest
from tiltyard.registry.v1.task_pb2 import GetTaskRequest
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2, model_pb2
from tiltyard.type.v1.participation_pb2 import ROLE_TRAINING_NODE, ROLE_VALIDATOR
from tiltyard.type.v1.task_pb2 import TASK_STATE_PREPARING, TaskConfig

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DENIED = grpc.StatusCode.PERMISSION_DENIED
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


def weights(*hidden: int) -> bytes:
    """A model of the tests' tasks; their own has hidden layers of 8, 8 and 8."""
    spec = ModelSpec(input_shape=(4,), outputs=3, architecture=Mlp(hidden or (8, 8, 8)))
    return save({name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(spec).items()})


async def hand_in(client: Client, content: bytes) -> str:
    header = UploadHeader(artifact=artifact_name(content), size_bytes=len(content), base_model=True)
    return (await client.artifacts.UploadArtifact(uploading(header, content))).artifact.name


def config_from(dataset: bytes, base_model: str) -> TaskConfig:
    config = config_of(dataset)
    config.base_model = base_model
    return config


async def reads(client: Client, name: str) -> bytes:
    return b"".join(
        [part.chunk async for part in client.artifacts.DownloadArtifact(DownloadArtifactRequest(name=name))]
    )


@pytest.fixture
def dataset(tmp_path: Path) -> bytes:
    return dataset_bytes(tmp_path)


async def test_who_may_create_no_task_hands_no_base_model_in(arena: RegistryServer) -> None:
    stranger, endorsed = await arena.participant("stranger"), await arena.participant("endorsed")
    arena.selection.refused.add(stranger.key.id)
    arena.selection.endorsement_needed.add(endorsed.key.id)
    unnamed = UploadHeader(size_bytes=len(weights()), base_model=True)
    for client in (stranger, endorsed):
        with refused(PRECONDITION, "NOT_ELIGIBLE"):
            await hand_in(client, weights())
        with refused(PRECONDITION, "NOT_ELIGIBLE"):
            await client.artifacts.UploadArtifact(uploading(unnamed, weights()))
    assert not [*(arena.folder / "state" / "uploads").iterdir()]
    assert "verdict" not in await arena.kinds()
    # In one field, whichever it is: what the task's will be is not known yet.
    trusted = await arena.participant("trusted", arena.trusted)
    word = envelope_pb2.EndorsementStatement(
        origin=ORIGIN,
        endorser=f"participants/{trusted.key.id}",
        subject=f"participants/{endorsed.key.id}",
        field="vision",
    )
    await trusted.participants.EndorseParticipant(
        EndorseParticipantRequest(statement=sign_statement(trusted.key, word))
    )
    await hand_in(endorsed, weights())


async def test_active_training_nodes_of_the_task_read_the_model_that_it_names(
    arena: RegistryServer, dataset: bytes
) -> None:
    creator, node, validator = [await arena.participant(name) for name in ("creator", "node", "validator")]
    base = await hand_in(creator, weights())
    await arena.open_task(creator, dataset, config=config_from(dataset, base))
    assert (await node.tasks.GetTask(GetTaskRequest(name="tasks/t"))).task.config.base_model == base
    assert [
        entry.task_created.config.base_model for entry in await arena.entries() if entry.HasField("task_created")
    ] == [base]
    with refused(DENIED, "ARTIFACT_NOT_YOURS"):
        await reads(node, base)
    joined = await arena.join(node, ROLE_TRAINING_NODE)
    await arena.join(validator, ROLE_VALIDATOR)
    assert await reads(node, base) == weights()
    with refused(DENIED, "ARTIFACT_NOT_YOURS"):
        await reads(validator, base)
    await node.memberships.PauseMembership(PauseMembershipRequest(name=joined.member.name))
    with refused(DENIED, "ARTIFACT_NOT_YOURS"):
        await reads(node, base)


async def test_two_participants_hand_in_the_same_model_and_neither_takes_it_from_the_other(
    arena: RegistryServer, dataset: bytes
) -> None:
    one, other, stranger = [await arena.participant(name) for name in ("one", "other", "stranger")]
    base = await hand_in(one, weights())
    assert await hand_in(other, weights()) == base
    for client in (one, other):
        assert await reads(client, base) == weights()
    with refused(INVALID, "ARTIFACT_NOT_YOURS", field="config.base_model"):
        await arena.create_task(stranger, dataset, config=config_from(dataset, base))
    for name, client in (("a", one), ("b", other)):
        task = await arena.create_task(client, dataset, task=name, config=config_from(dataset, base))
        assert task.state == TASK_STATE_PREPARING


async def test_another_architecture_is_refused_with_both_shapes(arena: RegistryServer, dataset: bytes) -> None:
    creator = await arena.participant()
    base = await hand_in(creator, weights(8, 9, 8))
    with pytest.raises(grpc.aio.AioRpcError, match=r"\(9, 8\).*\(8, 8\)"):
        await arena.create_task(creator, dataset, config=config_from(dataset, base))
    with refused(INVALID, "BASE_MODEL_UNFIT", field="config.base_model"):
        await arena.create_task(creator, dataset, config=config_from(dataset, base))
    # A dataset is safetensors, too.
    await arena.create_task(creator, dataset, task="earlier")
    await arena.upload(creator, dataset, task="tasks/earlier")
    with refused(INVALID, "BASE_MODEL_UNFIT", field="config.base_model"):
        await arena.create_task(creator, dataset, config=config_from(dataset, artifact_name(dataset)))
    assert "task_created" in await arena.kinds()
    assert (await arena.kinds()).count("task_created") == 1


async def test_what_cannot_be_a_base_model_is_refused_by_the_field(arena: RegistryServer, dataset: bytes) -> None:
    creator = await arena.participant()
    base = await hand_in(creator, weights())

    async def refuses(config: TaskConfig, reason: str | None = None) -> None:
        with refused(INVALID, reason, field="config.base_model"):
            await arena.create_task(creator, dataset, config=config)

    await refuses(config_from(dataset, artifact_name(b"never uploaded")), "ARTIFACT_NOT_FOUND")
    await refuses(config_from(dataset, "artifacts/../../etc/passwd"))
    several = config_from(dataset, base)
    several.models.append(model_pb2.ModelSpec(input_shape=[4], outputs=3, linear=model_pb2.Linear()))
    await refuses(several)
    onnx = config_from(dataset, base)
    onnx.models[0].onnx.SetInParent()
    await refuses(onnx)
    small = config_from(dataset, base)
    small.limits.max_model_bytes = 100
    await refuses(small, "BASE_MODEL_UNFIT")


async def test_only_participants_hand_in_base_models(arena: RegistryServer) -> None:
    from tiltyard.identity import Key

    stranger = await arena.client(Key.generate())
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "NOT_REGISTERED"):
        await hand_in(stranger, weights())
    member = await arena.participant()
    header = UploadHeader(artifact=artifact_name(weights()), size_bytes=len(weights()), base_model=False)
    with refused(INVALID, field="header.purpose"):
        await member.artifacts.UploadArtifact(uploading(header, weights()))
    with refused(grpc.StatusCode.NOT_FOUND):
        await member.artifacts.GetArtifact(GetArtifactRequest(name=artifact_name(weights())))


async def test_a_model_of_an_earlier_task_may_be_the_next_one_s_base(arena: RegistryServer, dataset: bytes) -> None:
    creator = await arena.participant()
    base = await hand_in(creator, weights())
    await arena.create_task(creator, dataset, task="first", config=config_from(dataset, base))
    again = await arena.create_task(creator, dataset, task="second", config=config_from(dataset, base))
    assert again.config.base_model == base
    assert again.config.evaluation_dataset == digest_of(dataset)
