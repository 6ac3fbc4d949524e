"""SubmissionService over a real server."""

import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.registry.states import MembershipState, Role, SubmissionState, TaskState
from services.runtime import names
from services.runtime.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from tests.support.registry_arena import Arena, bad_fields, refusal, served
from tests.support.registry_world import NODES, ORIGIN, TASK, VALIDATORS, key_of, model_bytes
from tiltyard.commitments import submission_commitment
from tiltyard.identity import Key
from tiltyard.registry.v1 import (
    assignment_pb2,
    assignment_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    submission_pb2,
    submission_pb2_grpc,
)
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2, model_pb2
from tiltyard.type.v1 import evaluation_pb2 as type_pb2

NODE = NODES[0]
MODEL = model_bytes("a")
DIGEST = hashlib.sha256(MODEL).digest()
SALT = bytes(range(32))


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[Arena]:
    async with served(tmp_path) as arena:
        await arena.world.open_task()
        yield arena


def commit_request(
    key: Key = NODE, *, signer: Key | None = None, salt: bytes = SALT, request_id: str = "", **changes: Any
) -> submission_pb2.CommitSubmissionRequest:
    task, participant = names.format_task(TASK), names.format_participant(key.id)
    fields = {
        "origin": ORIGIN,
        "task": task,
        "participant": participant,
        "commitment": submission_commitment(
            origin=ORIGIN, task=task, participant=participant, model_digest=DIGEST, salt=salt
        ),
    }
    statement = envelope_pb2.CommitStatement(**{**fields, **changes})
    envelope = sign_statement(signer or key, statement)
    return submission_pb2.CommitSubmissionRequest(statement=envelope, request_id=request_id)


def reveal_request(
    key: Key = NODE, *, number: int = 1, request_id: str = "", **changes: Any
) -> submission_pb2.RevealSubmissionRequest:
    fields = {
        "origin": ORIGIN,
        "submission": names.format_submission(TASK, number),
        "model_digest": DIGEST,
        "salt": SALT,
        "format": model_pb2.MODEL_FORMAT_SAFETENSORS,
    }
    statement = envelope_pb2.RevealStatement(**{**fields, **changes})
    return submission_pb2.RevealSubmissionRequest(statement=sign_statement(key, statement), request_id=request_id)


async def test_a_model_is_committed_revealed_and_read(arena: Arena) -> None:
    world, node = arena.world, arena.peer(NODE).submissions
    committed = (await node.CommitSubmission(commit_request())).submission
    assert committed.name == f"tasks/{TASK}/submissions/1"
    assert committed.participant == f"participants/{NODE.id}"
    assert committed.state == type_pb2.SUBMISSION_STATE_COMMITTED
    assert committed.deadline.ToDatetime() - committed.commit_time.ToDatetime() == timedelta(hours=1)
    assert not committed.model_digest
    await world.upload(NODE, 1, MODEL)
    revealed = (await node.RevealSubmission(reveal_request())).submission
    assert revealed.state == type_pb2.SUBMISSION_STATE_REVEALED
    assert (revealed.model_digest, revealed.size_bytes) == (DIGEST, len(MODEL))
    await world.turn()
    await world.judge(1, 900, 900, 900)
    stranger = arena.peer(key_of("stranger")).submissions
    read = (await stranger.GetSubmission(submission_pb2.GetSubmissionRequest(name=committed.name))).submission
    assert read.state == type_pb2.SUBMISSION_STATE_SCORED
    assert (read.score.correct, read.score.total, read.score.round) == (900, 1000, 1)
    assert list(read.scores) == [read.score]
    assert list(read.draws) == [f"draws/{TASK}-1-1"]
    assert list(read.validators) == [f"participants/{duty.participant}" for duty in await world.duties(1)]
    assert list(read.score.evaluations) == [names.format_evaluation(duty) for duty in await world.duties(1)]
    assert not read.HasField("deadline")


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (commit_request(signer=NODES[1]), ["statement"]),
        (commit_request(origin="elsewhere"), ["statement.origin"]),
        (commit_request(participant=f"participants/{NODES[1].id}"), ["statement.participant"]),
        (commit_request(commitment=b"short"), ["statement.commitment"]),
        (commit_request(task="digits"), ["statement.task"]),
        (submission_pb2.CommitSubmissionRequest(), ["statement"]),
        (submission_pb2.CommitSubmissionRequest(statement=reveal_request().statement), ["statement"]),
    ],
    ids=["another signer", "another origin", "another participant", "short", "no task name", "empty", "another kind"],
)
async def test_bad_commits_name_the_field_and_change_nothing(
    arena: Arena, request_: submission_pb2.CommitSubmissionRequest, fields: list[str]
) -> None:
    assert bad_fields(await refusal(arena.peer(NODE).submissions.CommitSubmission(request_))) == fields
    assert await arena.world.leaf_kinds() == []


async def test_a_tampered_statement_is_refused(arena: Arena) -> None:
    request = commit_request()
    request.statement.payload += b"\0"
    assert bad_fields(await refusal(arena.peer(NODE).submissions.CommitSubmission(request))) == ["statement"]


async def test_only_active_training_nodes_commit(arena: Arena) -> None:
    for key in (VALIDATORS[0], key_of("stranger")):
        refused = await refusal(arena.peer(key).submissions.CommitSubmission(commit_request(key)))
        assert (type(refused), refused.reason) == (FailedPrecondition, "NOT_A_TRAINING_NODE")
    await arena.world.join(NODE, Role.TRAINING_NODE, state=MembershipState.PAUSED)
    refused = await refusal(arena.peer(NODE).submissions.CommitSubmission(commit_request()))
    assert refused.reason == "NOT_A_TRAINING_NODE"


async def test_only_open_tasks_take_commits(arena: Arena) -> None:
    node = arena.peer(NODE).submissions
    unknown = commit_request(task="tasks/unknown")
    assert isinstance(await refusal(node.CommitSubmission(unknown)), NotFound)
    for state in (TaskState.PREPARING, TaskState.CLOSED, TaskState.FINAL, TaskState.CANCELLED):
        await arena.world.change_task(state=state)
        assert (await refusal(node.CommitSubmission(commit_request()))).reason == "TASK_NOT_OPEN"
    await arena.world.change_task(state=TaskState.OPEN)
    arena.world.clock.advance(seconds=7 * 24 * 3600)
    assert (await refusal(node.CommitSubmission(commit_request()))).reason == "TASK_NOT_OPEN"


async def test_the_daily_limit_says_the_exact_wait(arena: Arena) -> None:
    node = arena.peer(NODE).submissions
    for _ in range(3):
        await node.CommitSubmission(commit_request())
        arena.world.clock.advance(seconds=10)
    refused = await refusal(node.CommitSubmission(commit_request()))
    assert isinstance(refused, ResourceExhausted)
    assert (refused.reason, refused.retry_after_s) == ("DAILY_LIMIT", 24 * 3600 - 30)


async def test_requests_with_an_id_are_answered_once(arena: Arena) -> None:
    node = arena.peer(NODE).submissions
    first = await node.CommitSubmission(commit_request(request_id="one"))
    assert await node.CommitSubmission(commit_request(request_id="one")) == first
    other = await refusal(node.CommitSubmission(commit_request(salt=bytes(32), request_id="one")))
    assert (type(other), other.reason) == (AlreadyExists, "REQUEST_ID_REUSED")
    await arena.world.upload(NODE, 1, MODEL)
    revealed = await node.RevealSubmission(reveal_request(request_id="one"))
    assert await node.RevealSubmission(reveal_request(request_id="one")) == revealed
    assert await arena.world.leaf_kinds() == ["submission_committed", "submission_revealed"]


@pytest.mark.parametrize(
    "changes", [{"salt": bytes(32)}, {"model_digest": bytes(32)}], ids=["another salt", "another model"]
)
async def test_a_reveal_that_does_not_match_leaves_the_submission_committed(
    arena: Arena, changes: dict[str, bytes]
) -> None:
    node = arena.peer(NODE).submissions
    await node.CommitSubmission(commit_request())
    await arena.world.upload(NODE, 1, MODEL)
    refused = await refusal(node.RevealSubmission(reveal_request(**changes)))
    assert refused.reason == "COMMITMENT_MISMATCH"
    assert bad_fields(refused) == ["statement.model_digest", "statement.salt"]
    assert (await arena.world.submission(1)).state is SubmissionState.COMMITTED
    assert await arena.world.leaf_kinds() == ["submission_committed"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_index": 1}, "statement.model_index"),
        ({"model_index": -1}, "statement.model_index"),
        ({"format": model_pb2.MODEL_FORMAT_ONNX}, "statement.format"),
        ({"format": 0}, "statement.format"),
        ({"format": 77}, "statement.format"),
        ({"salt": b"short"}, "statement.salt"),
        ({"model_digest": b""}, "statement.model_digest"),
        ({"submission": "submissions/1"}, "statement.submission"),
        ({"origin": "elsewhere"}, "statement.origin"),
    ],
)
async def test_bad_reveals_name_the_field(arena: Arena, changes: dict[str, Any], field: str) -> None:
    node = arena.peer(NODE).submissions
    await node.CommitSubmission(commit_request())
    await arena.world.upload(NODE, 1, MODEL)
    assert bad_fields(await refusal(node.RevealSubmission(reveal_request(**changes)))) == [field]


async def test_reveals_before_the_upload_of_another_and_twice(arena: Arena) -> None:
    node = arena.peer(NODE).submissions
    await node.CommitSubmission(commit_request())
    early = await refusal(node.RevealSubmission(reveal_request()))
    assert (type(early), early.reason) == (FailedPrecondition, "MODEL_NOT_UPLOADED")
    await arena.world.upload(NODE, 1, MODEL)
    other = await refusal(arena.peer(NODES[1]).submissions.RevealSubmission(reveal_request(NODES[1])))
    assert isinstance(other, PermissionDenied)
    assert isinstance(await refusal(node.RevealSubmission(reveal_request(number=2))), NotFound)
    await node.RevealSubmission(reveal_request())
    assert (await refusal(node.RevealSubmission(reveal_request()))).reason == "NOT_COMMITTED"


async def test_a_copy_names_the_original(arena: Arena) -> None:
    await arena.world.submit(NODES[1], MODEL)
    await arena.world.commit(NODE, MODEL)
    await arena.world.upload(NODE, 2, MODEL)
    copy = await arena.world.reveal(NODE, 2, MODEL)
    assert copy.state == type_pb2.SUBMISSION_STATE_REJECTED
    assert copy.reason == type_pb2.REJECTION_REASON_COPY
    assert copy.original == f"tasks/{TASK}/submissions/1"


async def test_lists_are_paged_and_filtered(arena: Arena) -> None:
    world, reader = arena.world, arena.peer(key_of("reader")).submissions
    for index, node in enumerate([NODES[0], NODES[1], NODES[0], NODES[1], NODES[0]]):
        number = await world.commit(node, model_bytes(str(index)))
        if index < 2:
            await world.upload(node, number, model_bytes(str(index)))
            await world.reveal(node, number, model_bytes(str(index)))

    async def listed(filter_: str = "", size: int = 2) -> list[list[int]]:
        pages: list[list[int]] = []
        token = ""
        while not pages or token:
            request = submission_pb2.ListSubmissionsRequest(
                parent=f"tasks/{TASK}", page_size=size, page_token=token, filter=filter_
            )
            page = await reader.ListSubmissions(request)
            pages.append([names.parse_submission(found.name)[1] for found in page.submissions])
            token = page.next_page_token
        return pages

    assert await listed() == [[1, 2], [3, 4], [5]]
    assert await listed(size=5) == [[1, 2, 3, 4, 5]]
    assert await listed(f"participant = participants/{NODES[0].id}") == [[1, 3], [5]]
    assert await listed("state = REVEALED") == [[1, 2]]
    assert await listed(f'state = SUBMISSION_STATE_COMMITTED AND participant = "participants/{NODES[1].id}"') == [[4]]
    assert await listed("state = SCORED") == [[]]


async def test_bad_lists_name_the_field(arena: Arena) -> None:
    world, reader = arena.world, arena.peer(key_of("reader")).submissions
    for index in range(3):
        await world.commit(NODE, model_bytes(str(index)))

    def request(**fields: Any) -> submission_pb2.ListSubmissionsRequest:
        return submission_pb2.ListSubmissionsRequest(**{"parent": f"tasks/{TASK}", "page_size": 1, **fields})

    token = (await reader.ListSubmissions(request())).next_page_token
    for bad, field in [
        (request(page_token=token, filter="state = COMMITTED"), "page_token"),
        (request(page_token="forged"), "page_token"),
        (request(page_size=-1), "page_size"),
        (request(parent="nothing"), "parent"),
        (request(filter="state == COMMITTED"), "filter"),
        (request(filter="state = NOWHERE"), "filter"),
        (request(filter="colour = red"), "filter"),
        (request(filter="participant = me"), "filter"),
    ]:
        assert bad_fields(await refusal(reader.ListSubmissions(bad))) == [field]
    position = await refusal(reader.ListSubmissions(request(filter="state = COMMITTED OR state = SCORED")))
    assert isinstance(position, InvalidArgument)
    assert position.violations[0].description == "at character 19: expected AND"
    assert isinstance(await refusal(reader.ListSubmissions(request(parent="tasks/unknown"))), NotFound)


async def test_unknown_and_malformed_names(arena: Arena) -> None:
    reader = arena.peer(key_of("reader")).submissions
    unknown = submission_pb2.GetSubmissionRequest(name=f"tasks/{TASK}/submissions/9")
    assert isinstance(await refusal(reader.GetSubmission(unknown)), NotFound)
    malformed = submission_pb2.GetSubmissionRequest(name=f"tasks/{TASK}/submissions/0")
    assert bad_fields(await refusal(reader.GetSubmission(malformed))) == ["name"]


async def test_the_score_that_ranks_is_the_ranking_rounds(arena: Arena) -> None:
    world = arena.world
    await world.submit(NODE, MODEL)
    await world.turn()
    await world.judge(1, 900, 900, 900)

    def second(tx: Any) -> None:
        submission = tx.submission(TASK, 1)
        score = replace(submission.scores[1], round=2, correct=400, total=500)
        tx.put_submission(replace(submission, scores={**submission.scores, 2: score}))

    await world.store.write(second)
    reader = arena.peer(key_of("reader")).submissions
    request = submission_pb2.GetSubmissionRequest(name=f"tasks/{TASK}/submissions/1")
    assert (await reader.GetSubmission(request)).submission.score.round == 1
    await world.change_task(state=TaskState.FINAL, ranking_round=2)
    ranked = (await reader.GetSubmission(request)).submission
    assert (ranked.score.round, ranked.score.correct) == (2, 400)
    assert [score.round for score in ranked.scores] == [1, 2]


async def test_without_a_token_nothing_is_answered(arena: Arena) -> None:
    async with grpc.aio.insecure_channel(arena.server.address) as channel:
        submissions = submission_pb2_grpc.SubmissionServiceStub(channel)
        assignments = assignment_pb2_grpc.AssignmentServiceStub(channel)
        evaluations = evaluation_pb2_grpc.EvaluationServiceStub(channel)
        for call in (
            submissions.CommitSubmission(commit_request()),
            submissions.GetSubmission(submission_pb2.GetSubmissionRequest(name=f"tasks/{TASK}/submissions/1")),
            assignments.ListAssignments(assignment_pb2.ListAssignmentsRequest()),
            evaluations.ListEvaluations(evaluation_pb2.ListEvaluationsRequest()),
        ):
            assert (await refusal(call)).reason == "TOKEN_MISSING"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(assignments.WatchAssignments(assignment_pb2.WatchAssignmentsRequest())))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
