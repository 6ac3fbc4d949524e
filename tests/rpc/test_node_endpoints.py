"""A training node's own endpoint: asked by drawn validators that cannot evaluate a model, and by nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_validator import LONG_S, ValidatorProcess
from trainer_registry import MODELS, request, served, until_ended
from trainer_registry import FakeRegistry as NodesRegistry
from validator_registry import DECLINED, OPENED, dataset_bytes
from validator_registry import FakeRegistry as ValidatorsRegistry

from services.runtime.server import ArenaServer, Mount
from services.validator import assignments
from services.validator.evaluation import CannotEvaluate
from services.validator.nodes import NodeEndpoints, parse_reach
from services.validator.runs import Progress
from tiltyard.client import Node
from tiltyard.identity import Key
from tiltyard.inference.v2 import inference_pb2
from tiltyard.models import load_model
from tiltyard.modelspec import Linear, ModelSpec
from tiltyard.registry.v1 import assignment_pb2, assignment_pb2_grpc, task_pb2
from tiltyard.trainer.v1 import trainer_pb2
from tiltyard.type.v1 import evaluation_pb2 as types_pb2
from tiltyard.wire import model_spec_from_proto


class Registry(NodesRegistry, assignment_pb2_grpc.AssignmentServiceServicer):
    """A registry for one training node, that says who judges its submissions."""

    def __init__(self, member: str) -> None:
        super().__init__(member)
        self.allowed = True
        self.judges: dict[str, int] = {}
        self.asked = 0

    async def GetTask(self, request: task_pb2.GetTaskRequest, context: object) -> task_pb2.GetTaskResponse:
        answer = await super().GetTask(request, context)
        answer.task.config.allow_node_endpoint = self.allowed
        return answer

    async def ListAssignments(
        self, request: assignment_pb2.ListAssignmentsRequest, context: object
    ) -> assignment_pb2.ListAssignmentsResponse:
        self.asked += 1
        assert request.parent == "tasks/xor/submissions/1"
        found = [
            assignment_pb2.Assignment(validator=f"participants/{judge}", state=state)
            for judge, state in self.judges.items()
        ]
        return assignment_pb2.ListAssignmentsResponse(assignments=found)

    def mounts(self) -> list[Mount]:
        def add(server: grpc.aio.Server) -> None:
            assignment_pb2_grpc.add_AssignmentServiceServicer_to_server(self, server)

        return [*super().mounts(), Mount("tiltyard.registry.v1.AssignmentService", add)]


@dataclass(frozen=True)
class Submitted:
    """A node that has trained and submitted a model, and where the model lies."""

    registry: Registry
    node: Node
    training: str
    digest: bytes
    content: bytes

    @property
    def address(self) -> str:
        return self.node._address

    def stranger(self, key: Key) -> Node:
        return Node(key, address=self.address, node_id=self.registry.member)


@asynccontextmanager
async def submitted_model(state: Path) -> AsyncIterator[Submitted]:
    registry = Registry(Key.load_or_create(state / "key.pem").id)
    async with (
        ArenaServer("127.0.0.1:0", registry.mounts(), authenticator=None) as server,
        served(state, server.address) as node,
    ):
        name = (await node.trainings.StartTraining(request())).training.name
        done = (await until_ended(node, name))[-1]
        assert done.state == trainer_pb2.TRAINING_STATE_SUCCEEDED
        yield Submitted(registry, node, name.removeprefix("trainings/"), done.model_digest, registry.content)


def rows_of(model: str, x: np.ndarray) -> inference_pb2.ModelInferRequest:
    message = inference_pb2.ModelInferRequest(model_name=model, raw_input_contents=[x.tobytes()])
    message.inputs.add(name="x", datatype="FP32", shape=x.shape)
    return message


async def code_of(call: object) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def answers(stream: object) -> list[inference_pb2.ModelStreamInferResponse]:
    return [answer async for answer in stream]


async def test_a_submitted_model_answers_who_judges_it_now_and_nobody_else(tmp_path: Path) -> None:
    judge, stranger, late, another = (Key.generate() for _ in range(4))
    x = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)
    denied = grpc.StatusCode.PERMISSION_DENIED
    async with submitted_model(tmp_path) as done:
        name = done.digest.hex()
        done.registry.judges = {
            judge.id: types_pb2.ASSIGNMENT_STATE_ACCEPTED,
            late.id: types_pb2.ASSIGNMENT_STATE_EXPIRED,
            another.id: types_pb2.ASSIGNMENT_STATE_ACCEPTED,
        }
        own = await done.node.inference.ModelInfer(rows_of(done.training, x))
        async with done.stranger(judge) as client:
            answer = await client.inference.ModelInfer(rows_of(name, x))
            assert answer.raw_output_contents == own.raw_output_contents
            assert (await client.inference.ModelReady(inference_pb2.ModelReadyRequest(name=name))).ready
            streamed = await answers(client.inference.ModelStreamInfer(iter([rows_of(name, x)] * 2)))
            assert [each.infer_response.raw_output_contents for each in streamed] == [own.raw_output_contents] * 2
            # Asked once for all of these.
            assert done.registry.asked == 1
            # What is not theirs to judge, or not for them at all.
            for other in (done.training, "00" * 32, name.upper() + "00", "", "../x"):
                assert await code_of(client.inference.ModelInfer(rows_of(other, x))) is denied
            stream = client.inference.ModelStreamInfer(iter([rows_of(name, x), rows_of(done.training, x)]))
            assert await code_of(answers(stream)) is denied
            load = inference_pb2.RepositoryModelLoadRequest(model_name=name)
            assert await code_of(client.inference.RepositoryModelLoad(load)) is denied
            index = client.inference.RepositoryIndex(inference_pb2.RepositoryIndexRequest())
            assert await code_of(index) is denied
            training = trainer_pb2.GetTrainingRequest(name=f"trainings/{done.training}")
            assert await code_of(client.trainings.GetTraining(training)) is denied
        for key in (stranger, late, another):
            # A judge, too, where the task does not allow it.
            done.registry.allowed = key is not another
            async with done.stranger(key) as client:
                assert await code_of(client.inference.ModelInfer(rows_of(name, x))) is denied


async def test_a_validator_without_room_for_the_model_asks_the_node_and_says_so(tmp_path: Path) -> None:
    x = np.random.default_rng(2).normal(size=(300, 2)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    data = dataset_bytes(x, y)
    key = Key.load_or_create(tmp_path / "state" / "key.pem")
    registry = ValidatorsRegistry(key.id)
    await registry.start()
    (tmp_path / "node").mkdir()
    async with submitted_model(tmp_path / "node") as done:
        done.registry.judges = {key.id: types_pb2.ASSIGNMENT_STATE_ACCEPTED}
        validator = ValidatorProcess(
            tmp_path / "state", registry.address, cache_bytes=len(data) + 10, node_endpoints="127.0.0.0/8"
        )
        await validator.start()
        try:
            spec = model_spec_from_proto(MODELS[1])
            found = {}
            for name, endpoint in (
                ("asked", f"grpc://localhost:{done.address.rpartition(':')[2]}"),
                ("elsewhere", "grpc://[::1]:9"),
            ):
                offered = await registry.offer(
                    data, done.content, spec, node=f"participants/{done.registry.member}", node_endpoint=endpoint
                )
                found[name] = await asyncio.wait_for(registry.until(offered, OPENED, DECLINED), LONG_S)
        finally:
            await validator.stop()
            await registry.stop()
    report = found["asked"].report
    assert report is not None, found["asked"].reason
    (tmp_path / "m").write_bytes(done.content)
    with torch.inference_mode():
        right = (load_model(spec, tmp_path / "m")(torch.from_numpy(x)).argmax(dim=1).numpy() == y).sum()
    assert (report.node_endpoint, report.counts.correct, report.counts.total) == (True, right, len(y))
    assert "by the node's own endpoint, since here" in report.detail
    # Never fetched: there is no room for it.
    assert [name for name in registry.downloads if done.digest.hex() in name] == []
    assert "leads where this validator does not go" in found["elsewhere"].reason


async def test_a_server_that_answers_a_batch_now_and_then_is_given_up(tmp_path: Path) -> None:
    rows = 10 * 4096
    save_file({"x": np.zeros((rows, 4), np.float32), "y": np.zeros(rows, np.int64)}, tmp_path / "dataset")
    one_by_one = asyncio.Lock()

    async def answer(request: inference_pb2.ModelInferRequest, context: object) -> inference_pb2.ModelInferResponse:
        async with one_by_one:
            await asyncio.sleep(0.2)
        response = inference_pb2.ModelInferResponse(raw_output_contents=[bytes(8 * 4096)])
        response.outputs.add(name="logits", datatype="FP32", shape=[4096, 2])
        return response

    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(
        answer, inference_pb2.ModelInferRequest.FromString, inference_pb2.ModelInferResponse.SerializeToString
    )
    service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": method})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    nodes = NodeEndpoints(
        parse_reach("127.0.0.0/8"),
        key=Key.generate(),
        concurrency=1,
        longest_s=lambda order: 0.5,
    )
    node = assignments.Node("a" * 40, f"grpc://127.0.0.1:{port}")
    order = assignments.Order("d" * 64, 1, "e" * 64, 1, ModelSpec((4,), 2, Linear()), 1, 1, node=node)
    try:
        with pytest.raises(CannotEvaluate, match=r"took more than 0\.5 s"):
            await nodes.evaluate(order, tmp_path / "dataset", Progress())
    finally:
        nodes.close()
        await server.stop(0)
