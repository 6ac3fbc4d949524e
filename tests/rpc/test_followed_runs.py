"""A validator's run, followed from a shell through breaks of the connection."""

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from tiltyard.calls import resuming
from tiltyard.cli.validators import follow
from tiltyard.client import Node
from tiltyard.identity import Key
from tiltyard.validator.v1 import validator_pb2, validator_pb2_grpc


@dataclass
class SmallValidator(validator_pb2_grpc.ValidationServiceServicer):
    """Breaks off each watch but the last, with these codes, after `silences` of them that fall silent."""

    breaks: list[grpc.StatusCode] = field(default_factory=list)
    silences: int = 0
    position: int = 0

    async def GetStatus(self, request: Any, context: Any) -> validator_pb2.GetStatusResponse:
        return validator_pb2.GetStatusResponse()

    async def WatchEvaluationRun(self, request: Any, context: Any) -> Any:
        self.position += 1
        yield validator_pb2.WatchEvaluationRunResponse(run=validator_pb2.EvaluationRun(position=self.position))
        if self.position <= self.silences:
            await asyncio.Event().wait()
        if self.breaks:
            await context.abort(self.breaks.pop(0), "for the test")


async def positions(validator: SmallValidator) -> list[int]:
    server = grpc.aio.server()
    validator_pb2_grpc.add_ValidationServiceServicer_to_server(validator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with Node(Key.generate(), address=f"127.0.0.1:{port}", node_id="n") as node:
            return [run.position async for run in follow(node, "tasks/t/submissions/1/assignments/1-a")]
    finally:
        await server.stop(0)


async def test_a_run_is_followed_through_restarts_and_the_end_of_a_long_stream() -> None:
    breaks = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED]
    assert await positions(SmallValidator(breaks)) == [1, 2, 3]


async def test_a_run_is_followed_through_a_stream_that_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "_LONGEST_SILENCE_S", 1.0)
    async with asyncio.timeout(60):
        assert (await positions(SmallValidator(silences=2)))[-1] >= 3


async def test_a_stream_that_breaks_again_and_again_is_begun_anew_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses = list[float]()

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)

    monkeypatch.setattr(resuming, "asyncio", SimpleNamespace(sleep=sleep, timeout=asyncio.timeout))
    monkeypatch.setattr(resuming, "time", SimpleNamespace(monotonic=lambda: 0.0))
    assert len(await positions(SmallValidator([grpc.StatusCode.UNAVAILABLE] * 7))) == 8
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


async def test_a_run_that_is_refused_is_not_asked_for_again() -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
        await positions(SmallValidator([grpc.StatusCode.NOT_FOUND]))
