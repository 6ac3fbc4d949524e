"""Everything that a registry tells of a task with LADDER visibility, by every method and stream and in the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from google.protobuf.message import Message

from tests.support.registry_server import RegistryServer
from tests.support.registry_world import CREATOR, NODES, VALIDATORS, key_of
from tests.support.told_arena import ToldArena, model_of
from tiltyard.audit.download import fetch_record
from tiltyard.client import Client
from tiltyard.identity import Key
from tiltyard.registry.v1 import (
    assignment_pb2,
    evaluation_pb2,
    leaderboard_pb2,
    membership_pb2,
    participant_pb2,
    submission_pb2,
    task_pb2,
)
from tiltyard.type.v1 import log_pb2
from tiltyard.type.v1 import task_pb2 as type_task_pb2

TASK = "tasks/hidden"
# In steps of 5 rows of 50: 33 is shown as 35, 36 does not beat it, 21 is shown as 20.
COUNTS, SHOWN = {33, 36, 21, 4}, {35, 20}


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[ToldArena]:
    server = RegistryServer(tmp_path)
    await server.start()
    told = ToldArena(server)
    await told.gather()
    yield told
    await server.stop()


async def tell(arena: ToldArena) -> None:
    """Three scores, the last after a dispute; one that is a fault; nothing is closed."""
    for node, model, rounds in (
        (NODES[0], "a", [[33, 33, 33]]),
        (NODES[0], "b", [[36, 36, 36]]),
        (NODES[1], "c", [[21, 21, 4], [21] * 7]),
        (NODES[1], "d", [["NAN_OUTPUT"] * 3]),
    ):
        number = await arena.submit("hidden", node, model_of(model))
        for findings in rounds:
            await arena.judge("hidden", number, *findings)
        await arena.ended("hidden", number)


async def told_to(client: Client) -> list[Message]:
    """All that reads of the task answer."""
    found: list[Message] = [
        await client.tasks.GetTask(task_pb2.GetTaskRequest(name=TASK)),
        await client.tasks.ListTasks(task_pb2.ListTasksRequest()),
        await client.memberships.ListMembers(membership_pb2.ListMembersRequest(parent=TASK)),
        await client.memberships.ListEligibilityVerdicts(membership_pb2.ListEligibilityVerdictsRequest(parent=TASK)),
        await client.participants.ListParticipants(participant_pb2.ListParticipantsRequest()),
        await client.leaderboard.GetLeaderboard(leaderboard_pb2.GetLeaderboardRequest(task=TASK)),
        await client.evaluations.ListValidatorFaults(evaluation_pb2.ListValidatorFaultsRequest(parent=TASK)),
        await client.assignments.ListAssignments(assignment_pb2.ListAssignmentsRequest(page_size=1000)),
    ]
    submissions = await client.submissions.ListSubmissions(submission_pb2.ListSubmissionsRequest(parent=TASK))
    found.append(submissions)
    for each in submissions.submissions:
        found.append(await client.submissions.GetSubmission(submission_pb2.GetSubmissionRequest(name=each.name)))
        found.append(await client.assignments.ListAssignments(assignment_pb2.ListAssignmentsRequest(parent=each.name)))
        evaluations = await client.evaluations.ListEvaluations(
            evaluation_pb2.ListEvaluationsRequest(parent=each.name, page_size=1000)
        )
        found.append(evaluations)
        for evaluation in evaluations.evaluations:
            full = evaluation_pb2.GetEvaluationRequest(name=evaluation.name, view=evaluation_pb2.EVALUATION_VIEW_FULL)
            found.append(await client.evaluations.GetEvaluation(full))
    return found + [log_pb2.LogEntry.FromString(leaf) for leaf in (await fetch_record(client)).leaves]


@asynccontextmanager
async def watching(client: Client) -> AsyncIterator[list[Message]]:
    """What the task's streams say, from here on."""
    heard: list[Message] = []

    async def hear(stream: AsyncIterable[Message]) -> None:
        async for message in stream:
            heard.append(message)  # noqa: PERF401 - each as it comes

    streams = (
        client.leaderboard.WatchLeaderboard(leaderboard_pb2.WatchLeaderboardRequest(task=TASK)),
        client.tasks.WatchTask(task_pb2.WatchTaskRequest(name=TASK)),
    )
    listeners = [asyncio.create_task(hear(stream)) for stream in streams]
    yield heard
    for listener in listeners:
        listener.cancel()
    await asyncio.gather(*listeners, return_exceptions=True)


def parts(message: Message) -> Iterator[Message]:
    """The message and all within it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for each in [value] if isinstance(value, Message) else value:
            yield from parts(each)


def counted(messages: list[Message]) -> set[int]:
    """Every count of right rows in the messages."""
    names = [part for message in messages for part in parts(message) if "correct" in part.DESCRIPTOR.fields_by_name]
    return {part.correct for part in names if part.correct}  # type: ignore[attr-defined]


def kinds(messages: list[Message]) -> set[str]:
    """Which messages there are, and which signed statements."""
    found = {part.DESCRIPTOR.name for message in messages for part in parts(message)}
    for message in messages:
        found |= {part.payload_type for part in parts(message) if part.DESCRIPTOR.name == "Envelope"}  # type: ignore[attr-defined]
    return found


def is_report(kind: str) -> bool:
    return kind in ("Counts", "EvaluationReport", "EvaluationOpened") or "report" in kind


async def test_nobody_is_told_a_count_before_the_task_is_closed(arena: ToldArena) -> None:
    config = {"score_visibility": type_task_pb2.SCORE_VISIBILITY_LADDER, "ladder_step_micros": 100_000}
    await arena.create("hidden", validators=12, **config)
    stranger = await arena.server.client(key_of("stranger"))
    async with watching(stranger) as heard:
        await tell(arena)
        readers: dict[str, Key] = {"creator": CREATOR, "node": NODES[0], "rival": NODES[1], "idle": NODES[2]}
        told = {name: await told_to(await arena.server.client(key)) for name, key in readers.items()}
        told["stranger"] = await told_to(stranger)
    for name, messages in (told | {"streams": heard}).items():
        assert counted(messages) == SHOWN, name
        assert not any(map(is_report, kinds(messages))), name
        assert {"Score", "LeaderboardEntry"} & kinds(messages), name
    # A validator has its own reports, and no other's.
    own = await told_to(await arena.server.client(VALIDATORS[0]))
    reports = [part for message in own for part in parts(message) if part.DESCRIPTOR.name == "EvaluationReport"]
    assert {report.assignment.rpartition("-")[2] for report in reports} <= {VALIDATORS[0].id}  # type: ignore[attr-defined]
    await arena.close("hidden")
    await arena.over("hidden")
    afterwards = await told_to(stranger)
    # The same look finds all of it now.
    assert counted(afterwards) >= COUNTS
    assert {"Counts", "EvaluationReport", "EvaluationOpened"} <= kinds(afterwards)
