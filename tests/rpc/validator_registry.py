"""A registry for validators to talk to in tests: assignments, evaluations and artifacts over a real server."""

import asyncio
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from safetensors.numpy import save

from services.runtime.auth import Authenticator, current_caller
from services.runtime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from services.runtime.fields import FieldChecks
from services.runtime.server import ArenaServer, Mount
from tiltyard.commitments import evaluation_seal
from tiltyard.modelspec import ModelSpec, tensor_shapes
from tiltyard.registry.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    assignment_pb2,
    assignment_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
)
from tiltyard.statements import open_statement
from tiltyard.type.v1 import envelope_pb2
from tiltyard.type.v1 import evaluation_pb2 as types_pb2
from tiltyard.wire import model_spec_to_proto

ORIGIN = "tiltyard.local"
OFFERED, ACCEPTED, SEALED, OPENED, DECLINED, EXPIRED, RELEASED = (
    getattr(types_pb2, f"ASSIGNMENT_STATE_{name}")
    for name in ("OFFERED", "ACCEPTED", "SEALED", "OPENED", "DECLINED", "EXPIRED", "RELEASED")
)
ENDED = {OPENED, DECLINED, EXPIRED, RELEASED}


def _check_text(field: str, value: str) -> None:
    """As the real one does."""
    checks = FieldChecks()
    checks.text(field, value, min_chars=0, max_chars=500)
    checks.finish()


@dataclass
class Duty:
    name: str
    order: assignment_pb2.EvaluationOrder
    state: int = OFFERED
    opening: bool = False
    holder: bytes = b""
    token: str = ""
    seal: bytes = b""
    report: envelope_pb2.EvaluationReport | None = None
    hashes: bytes = b""
    reason: str = ""
    renewals: int = 0


class FakeRegistry(
    assignment_pb2_grpc.AssignmentServiceServicer,
    evaluation_pb2_grpc.EvaluationServiceServicer,
    artifact_pb2_grpc.ArtifactServiceServicer,
):
    """Keeps duties in memory. `open_at_once` asks for a report as soon as it is sealed."""

    def __init__(self, validator: str, *, lease_s: float = 30.0) -> None:
        self.validator = validator
        self.lease_s = lease_s
        self.open_at_once = True
        self.refuse_seals = False
        self.seal_attempts: list[bytes] = []
        self.downloads: list[str] = []
        self.artifacts: dict[str, bytes] = {}
        self.duties: dict[str, Duty] = {}
        self.watches = 0
        self._log: list[str] = []
        self._changed = asyncio.Condition()
        self._server: ArenaServer | None = None
        self.address = "127.0.0.1:0"

    async def start(self) -> None:
        self._server = ArenaServer(
            self.address,
            [
                Mount(
                    "tiltyard.registry.v1.AssignmentService",
                    lambda server: assignment_pb2_grpc.add_AssignmentServiceServicer_to_server(self, server),
                ),
                Mount(
                    "tiltyard.registry.v1.EvaluationService",
                    lambda server: evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server(self, server),
                ),
                Mount(
                    "tiltyard.registry.v1.ArtifactService",
                    lambda server: artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(self, server),
                ),
            ],
            authenticator=Authenticator({f"{ORIGIN}/registry"}),
        )
        await self._server.start()
        self.address = self._server.address

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop(grace_s=0)

    def put(self, content: bytes) -> tuple[str, int]:
        digest = hashlib.sha256(content).hexdigest()
        self.artifacts[digest] = content
        return f"artifacts/{digest}", len(content)

    async def offer(
        self,
        dataset: bytes,
        model: bytes,
        spec: ModelSpec,
        *,
        task: str = "digits",
        max_cpu_s: int = 60,
        max_memory_bytes: int = 1 << 30,
        **metric,
    ) -> str:
        (dataset_name, dataset_bytes), (model_name, model_bytes) = self.put(dataset), self.put(model)
        order = assignment_pb2.EvaluationOrder(
            dataset=dataset_name,
            dataset_size_bytes=dataset_bytes,
            model=model_name,
            model_size_bytes=model_bytes,
            spec=model_spec_to_proto(spec),
            max_memory_bytes=max_memory_bytes,
            **metric,
        )
        order.max_cpu_time.FromTimedelta(timedelta(seconds=max_cpu_s))
        name = f"tasks/{task}/submissions/{len(self.duties) + 1}/assignments/1-{self.validator}"
        self.duties[name] = Duty(name, order)
        await self.change(name)
        return name

    async def change(self, name: str, **changes: object) -> None:
        for key, value in changes.items():
            setattr(self.duties[name], key, value)
        async with self._changed:
            self._log.append(name)
            self._changed.notify_all()

    async def until(self, name: str, *states: int) -> Duty:
        async with self._changed:
            await self._changed.wait_for(lambda: self.duties[name].state in states)
        return self.duties[name]

    async def until_seal_attempt(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.seal_attempts)

    async def until_renewed(self, name: str) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.duties[name].renewals)

    async def until_watched(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.watches)

    async def WatchAssignments(self, request, context):
        async with self._changed:
            self.watches += 1
            self._changed.notify_all()
        position = int(request.cursor or 0)
        shown = {duty.name for duty in self.duties.values() if duty.state not in ENDED}
        if not request.cursor:
            position = len(self._log)
            for name in sorted(shown):
                yield assignment_pb2.WatchAssignmentsResponse(assignment=self._message(name), cursor=str(position))
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda seen=position: len(self._log) > seen)
            while position < len(self._log):
                name = self._log[position]
                position += 1
                yield assignment_pb2.WatchAssignmentsResponse(assignment=self._message(name), cursor=str(position))

    async def ListAssignments(self, request, context):
        return assignment_pb2.ListAssignmentsResponse(assignments=[self._message(name) for name in self.duties])

    async def AcceptAssignment(self, request, context):
        duty = self._own(request.name)
        if duty.state in ENDED or duty.state == SEALED:
            raise FailedPrecondition("ASSIGNMENT_ENDED", "too late")
        if duty.holder not in (b"", request.lease_holder):
            raise AlreadyExists("LEASE_HELD", "the lease is held")
        assert len(request.lease_holder) == 32
        duty.token = duty.token or f"lease of {duty.name}"
        await self.change(duty.name, state=ACCEPTED, holder=request.lease_holder)
        return assignment_pb2.AcceptAssignmentResponse(
            assignment=self._message(duty.name), lease_token=duty.token, order=duty.order
        )

    async def RenewAssignment(self, request, context):
        duty = self._own(request.name)
        if duty.state != ACCEPTED or request.lease_token != duty.token:
            raise FailedPrecondition("LEASE_LOST", "the lease has passed on")
        await self.change(duty.name, renewals=duty.renewals + 1)
        return assignment_pb2.RenewAssignmentResponse(assignment=self._message(duty.name))

    async def DeclineAssignment(self, request, context):
        duty = self._own(request.name)
        _check_text("reason", request.reason)
        await self.change(duty.name, state=DECLINED, reason=request.reason)
        return assignment_pb2.DeclineAssignmentResponse(assignment=self._message(duty.name))

    async def CommitEvaluation(self, request, context):
        seal, signer = open_statement(request.statement, envelope_pb2.SealStatement)
        self.seal_attempts.append(seal.seal)
        duty = self._own(seal.assignment)
        await self.change(duty.name)
        if self.refuse_seals:
            raise Unavailable("DATABASE_UNAVAILABLE", "not now")
        if duty.state == SEALED and duty.seal == seal.seal:
            return evaluation_pb2.CommitEvaluationResponse()
        if duty.state != ACCEPTED or request.lease_token != duty.token:
            raise FailedPrecondition("NO_LEASE", "no lease is held")
        assert signer == self.validator
        assert seal.origin == ORIGIN
        await self.change(duty.name, state=SEALED, seal=seal.seal, opening=self.open_at_once)
        return evaluation_pb2.CommitEvaluationResponse()

    async def OpenEvaluation(self, request, context):
        report, signer = open_statement(request.report, envelope_pb2.EvaluationReport)
        duty = self._own(report.assignment)
        _check_text("report.detail", report.detail)
        if not duty.opening:
            raise FailedPrecondition("NOT_OPENING", "not yet")
        expected = evaluation_seal(assignment=duty.name, report=request.report.payload, salt=request.salt)
        if expected != duty.seal or signer != self.validator:
            raise InvalidArgument.field("report", "is not what was sealed", reason="SEAL_MISMATCH")
        await self.change(duty.name, state=OPENED, report=report, hashes=request.prediction_hashes)
        return evaluation_pb2.OpenEvaluationResponse()

    async def DownloadArtifact(self, request, context):
        digest = request.name.removeprefix("artifacts/")
        if digest not in self.artifacts:
            raise NotFound("ARTIFACT_NOT_FOUND", "no such artifact")
        self.downloads.append(digest)
        content = self.artifacts[digest]
        for start in range(request.offset, len(content), 512 * 1024):
            yield artifact_pb2.DownloadArtifactResponse(chunk=content[start : start + 512 * 1024])

    def _own(self, name: str) -> Duty:
        assert current_caller().id == self.validator
        return self.duties[name]

    def _message(self, name: str) -> assignment_pb2.Assignment:
        duty = self.duties[name]
        message = assignment_pb2.Assignment(
            name=name, validator=f"participants/{self.validator}", state=duty.state, opening=duty.opening, round=1
        )
        now = datetime.now(UTC)
        message.update_time.FromDatetime(now)
        message.deadline.FromDatetime(now + timedelta(seconds=self.lease_s))
        return message


def dataset_bytes(x: np.ndarray, y: np.ndarray) -> bytes:
    return save({"x": np.ascontiguousarray(x), "y": np.ascontiguousarray(y)})


def random_dataset(rows: int, shape: tuple[int, ...], outputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, *shape), dtype=np.uint8), rng.integers(0, outputs, rows)


def model_bytes(spec: ModelSpec, seed: int = 0, *, spoil: float | None = None) -> bytes:
    """Random weights of a spec; with `spoil` that value stands in the head."""
    rng = np.random.default_rng(seed)
    tensors = {name: (rng.normal(size=shape) * 0.1).astype(np.float32) for name, shape in tensor_shapes(spec).items()}
    if spoil is not None:
        tensors["head.weight"].flat[0] = spoil
    return save(tensors)
