"""EvaluationService over a real server."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest

from services.registry.states import AssignmentState
from services.runtime import names
from services.runtime.errors import AlreadyExists, FailedPrecondition, NotFound, PermissionDenied
from services.runtime.names import AssignmentId
from tests.support.registry_arena import Arena, bad_fields, refusal, served
from tests.support.registry_world import HASHES, KEYS, NODES, ORIGIN, TASK, key_of, model_bytes
from tiltyard.commitments import evaluation_seal
from tiltyard.registry.v1 import evaluation_pb2, evaluation_pb2_grpc
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2
from tiltyard.type.v1 import evaluation_pb2 as type_pb2

SALT = bytes(range(32))


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[Arena]:
    async with served(tmp_path) as arena:
        await arena.world.open_task()
        await arena.world.submit(NODES[0], model_bytes("a"))
        await arena.world.turn()
        yield arena


@pytest.fixture
async def duty(arena: Arena) -> AssignmentId:
    return (await arena.world.duties(1))[0]


def stub(arena: Arena, duty: AssignmentId) -> evaluation_pb2_grpc.EvaluationServiceStub:
    return arena.peer(KEYS[duty.participant]).evaluations


def seal_request(
    duty: AssignmentId, report: envelope_pb2.EvaluationReport, *, token: str = "", request_id: str = "", **changes: Any
) -> evaluation_pb2.CommitEvaluationRequest:
    key, name = KEYS[duty.participant], names.format_assignment(duty)
    payload = sign_statement(key, report).payload
    fields = {
        "origin": ORIGIN,
        "assignment": name,
        "seal": evaluation_seal(assignment=name, report=payload, salt=SALT),
    }
    statement = envelope_pb2.SealStatement(**{**fields, **changes})
    return evaluation_pb2.CommitEvaluationRequest(
        statement=sign_statement(key, statement), lease_token=token, request_id=request_id
    )


def open_request(
    duty: AssignmentId,
    report: envelope_pb2.EvaluationReport,
    *,
    salt: bytes = SALT,
    hashes: Sequence[bytes] = HASHES,
    request_id: str = "",
) -> evaluation_pb2.OpenEvaluationRequest:
    envelope = sign_statement(KEYS[duty.participant], report)
    return evaluation_pb2.OpenEvaluationRequest(
        report=envelope, salt=salt, prediction_hashes=b"".join(hashes), request_id=request_id
    )


async def sealed_by_all(arena: Arena, duty: AssignmentId, report: envelope_pb2.EvaluationReport) -> None:
    """Everybody seals, `duty`'s validator this report, and all are asked to open."""
    for other in (await arena.world.duties(1))[1:]:
        await arena.world.evaluate(other, 900)
    token = await arena.world.accept(duty)
    await stub(arena, duty).CommitEvaluation(seal_request(duty, report, token=token))
    await arena.world.turn()


async def state_of(arena: Arena, duty: AssignmentId) -> AssignmentState:
    return next(a.state for a in await arena.world.all_duties(1) if a.validator == duty.participant)


async def test_a_report_is_sealed_opened_and_shown_when_the_submission_has_ended(
    arena: Arena, duty: AssignmentId
) -> None:
    world, validator = arena.world, stub(arena, duty)
    report = await world.report(duty, 900)
    await sealed_by_all(arena, duty, report)
    opened = (await validator.OpenEvaluation(open_request(duty, report))).evaluation
    assert opened.name == names.format_evaluation(duty)
    assert opened.finding == report
    assert opened.HasField("open_time")
    assert opened.prediction_hashes == b""
    reader = arena.peer(key_of("reader")).evaluations
    request = evaluation_pb2.GetEvaluationRequest(name=opened.name)
    hidden = (await reader.GetEvaluation(request)).evaluation
    assert hidden.seal == opened.seal
    assert not hidden.HasField("report")
    assert not hidden.HasField("finding")
    whole = evaluation_pb2.GetEvaluationRequest(name=opened.name, view=evaluation_pb2.EVALUATION_VIEW_FULL)
    assert (await reader.GetEvaluation(whole)).evaluation.prediction_hashes == b""
    assert (await validator.GetEvaluation(request)).evaluation.finding == report
    listed = await reader.ListEvaluations(evaluation_pb2.ListEvaluationsRequest(parent=f"tasks/{TASK}/submissions/1"))
    assert not any(found.HasField("report") for found in listed.evaluations)
    for other in (await world.duties(1))[1:]:
        await world.open(other, await world.report(other, 900))
    await world.turn()
    shown = (await reader.GetEvaluation(request)).evaluation
    assert shown.report == sign_statement(KEYS[duty.participant], report)
    assert shown.finding.counts.correct == 900
    assert shown.prediction_hashes == b""
    read = (await reader.GetEvaluation(whole)).evaluation
    assert (read.prediction_hashes, read.rows_per_hash) == (b"".join(HASHES), 256)
    assert shown.verdict == evaluation_pb2.EVALUATION_VERDICT_AGREED


@pytest.mark.parametrize("hashes", [[], HASHES[1:], [*HASHES, bytes(32)], [HASHES[1], HASHES[0], *HASHES[2:]]])
async def test_hashes_that_do_not_give_the_root_are_refused(
    arena: Arena, duty: AssignmentId, hashes: list[bytes]
) -> None:
    report = await arena.world.report(duty, 900)
    await sealed_by_all(arena, duty, report)
    refused = await refusal(stub(arena, duty).OpenEvaluation(open_request(duty, report, hashes=hashes)))
    assert bad_fields(refused) == ["prediction_hashes"]
    assert await state_of(arena, duty) is AssignmentState.SEALED
    await stub(arena, duty).OpenEvaluation(open_request(duty, report))
    assert await state_of(arena, duty) is AssignmentState.OPENED


async def test_faults_of_validators_are_listed_by_task_and_by_validator(arena: Arena, duty: AssignmentId) -> None:
    world, reader = arena.world, arena.peer(key_of("reader")).evaluations
    first, second, third = await world.duties(1)
    await world.accept(second)
    for other in (first, third):
        await world.evaluate(other, 900)
    # The lease runs out; a reserve takes its place.
    world.clock.advance(seconds=120)
    await world.turn()
    listed = await reader.ListValidatorFaults(evaluation_pb2.ListValidatorFaultsRequest(parent=f"tasks/{TASK}"))
    (fault,) = listed.faults
    assert fault.assignment == names.format_assignment(second)
    assert fault.kind == type_pb2.VALIDATOR_FAULT_KIND_LEASE_EXPIRED
    assert fault.time.ToDatetime(tzinfo=UTC) == world.clock()
    request = evaluation_pb2.ListValidatorFaultsRequest(parent=fault.validator)
    assert list((await reader.ListValidatorFaults(request)).faults) == [fault]
    request.parent = names.format_participant(first.participant)
    assert list((await reader.ListValidatorFaults(request)).faults) == []
    request.parent = "nobody"
    assert bad_fields(await refusal(reader.ListValidatorFaults(request))) == ["parent"]


async def test_a_seal_needs_a_running_lease_and_its_token(arena: Arena, duty: AssignmentId) -> None:
    world, validator = arena.world, stub(arena, duty)
    report = await world.report(duty, 900)
    none = await refusal(validator.CommitEvaluation(seal_request(duty, report)))
    assert (type(none), none.reason) == (FailedPrecondition, "NO_LEASE")
    token = await world.accept(duty)
    wrong = await refusal(validator.CommitEvaluation(seal_request(duty, report, token="wrong")))
    assert (type(wrong), wrong.reason) == (PermissionDenied, "WRONG_LEASE_TOKEN")
    world.clock.advance(seconds=120)
    lost = await refusal(validator.CommitEvaluation(seal_request(duty, report, token=token)))
    assert (type(lost), lost.reason) == (FailedPrecondition, "LEASE_LOST")
    await world.turn()
    lost = await refusal(validator.CommitEvaluation(seal_request(duty, report, token=token)))
    assert lost.reason == "LEASE_LOST"
    assert "evaluation_sealed" not in await world.leaf_kinds()


async def test_one_duty_has_one_seal(arena: Arena, duty: AssignmentId) -> None:
    world, validator = arena.world, stub(arena, duty)
    report = await world.report(duty, 900)
    token = await world.accept(duty)
    first = await validator.CommitEvaluation(seal_request(duty, report, token=token, request_id="one"))
    assert await validator.CommitEvaluation(seal_request(duty, report, token=token, request_id="one")) == first
    assert await validator.CommitEvaluation(seal_request(duty, report, token=token)) == first
    another = await world.report(duty, 901)
    refused = await refusal(validator.CommitEvaluation(seal_request(duty, another, token=token)))
    assert (type(refused), refused.reason) == (AlreadyExists, "ALREADY_SEALED")
    assert (await world.leaf_kinds()).count("evaluation_sealed") == 1
    late = await refusal(arena.peer(KEYS[duty.participant]).assignments.AcceptAssignment(_accept(duty)))
    assert late.reason == "ASSIGNMENT_ENDED"


def _accept(duty: AssignmentId) -> Any:
    from tiltyard.registry.v1 import assignment_pb2

    return assignment_pb2.AcceptAssignmentRequest(name=names.format_assignment(duty), lease_holder=bytes(32))


async def test_seals_of_others_and_bad_fields(arena: Arena, duty: AssignmentId) -> None:
    world, validator = arena.world, stub(arena, duty)
    report = await world.report(duty, 900)
    other = (await world.duties(1))[1]
    foreign = await refusal(validator.CommitEvaluation(seal_request(other, report)))
    assert bad_fields(foreign) == ["statement"]
    named = seal_request(duty, report, assignment=names.format_assignment(other))
    assert isinstance(await refusal(validator.CommitEvaluation(named)), PermissionDenied)
    unknown = seal_request(duty, report, assignment=names.format_assignment(AssignmentId(TASK, 9, 1, duty.participant)))
    assert isinstance(await refusal(validator.CommitEvaluation(unknown)), NotFound)
    for bad, field in [
        (seal_request(duty, report, seal=b"short"), "statement.seal"),
        (seal_request(duty, report, origin="elsewhere"), "statement.origin"),
        (seal_request(duty, report, assignment="x"), "statement.assignment"),
        (evaluation_pb2.CommitEvaluationRequest(), "statement"),
    ]:
        assert bad_fields(await refusal(validator.CommitEvaluation(bad))) == [field]


async def test_reports_are_opened_only_when_asked_for(arena: Arena, duty: AssignmentId) -> None:
    world, validator = arena.world, stub(arena, duty)
    report = await world.report(duty, 900)
    assert (await refusal(validator.OpenEvaluation(open_request(duty, report)))).reason == "NOT_OPENING"
    token = await world.accept(duty)
    await validator.CommitEvaluation(seal_request(duty, report, token=token))
    assert (await refusal(validator.OpenEvaluation(open_request(duty, report)))).reason == "NOT_OPENING"


async def test_what_does_not_give_the_seal_leaves_the_assignment_sealed(arena: Arena, duty: AssignmentId) -> None:
    world, validator = arena.world, stub(arena, duty)
    report = await world.report(duty, 900)
    await sealed_by_all(arena, duty, report)
    other = await world.report(duty, 901)
    for bad in (open_request(duty, other), open_request(duty, report, salt=bytes(32))):
        refused = await refusal(validator.OpenEvaluation(bad))
        assert refused.reason == "SEAL_MISMATCH"
        assert bad_fields(refused) == ["report", "salt"]
    assert await state_of(arena, duty) is AssignmentState.SEALED
    first = await validator.OpenEvaluation(open_request(duty, report, request_id="one"))
    assert await validator.OpenEvaluation(open_request(duty, report, request_id="one")) == first
    assert await validator.OpenEvaluation(open_request(duty, report)) == first


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda report: setattr(report, "dataset_digest", bytes(32)), "report.dataset_digest"),
        (lambda report: setattr(report, "dataset_digest", b"short"), "report.dataset_digest"),
        (lambda report: setattr(report, "model_digest", bytes(32)), "report.model_digest"),
        (lambda report: setattr(report.counts, "total", 999), "report.counts"),
        (lambda report: setattr(report.counts, "correct", 1001), "report.counts"),
        (lambda report: setattr(report.counts, "correct", -1), "report.counts"),
        (lambda report: setattr(report.counts, "ambiguous", 1001), "report.counts"),
        (lambda report: setattr(report, "prediction_blocks", 3), "report.prediction_blocks"),
        (lambda report: setattr(report, "prediction_blocks", -1), "report.prediction_blocks"),
        (lambda report: setattr(report, "prediction_blocks", (1 << 63) - 1), "report.prediction_blocks"),
        (lambda report: setattr(report, "prediction_root", b"short"), "report.prediction_root"),
        (lambda report: setattr(report, "prediction_root", bytes(32)), "prediction_hashes"),
        (lambda report: setattr(report, "fault", type_pb2.MODEL_FAULT_CRASHED), "report.prediction_root"),
        (lambda report: report.ClearField("counts"), "report.finding"),
        (lambda report: setattr(report, "fault", 77), "report.fault"),
        (lambda report: setattr(report, "fault", 0), "report.fault"),
        (lambda report: setattr(report, "detail", "x" * 501), "report.detail"),
        (lambda report: setattr(report, "origin", "elsewhere"), "report.origin"),
    ],
)
async def test_a_sealed_report_with_a_bad_field_is_never_opened(
    arena: Arena, duty: AssignmentId, change: Any, field: str
) -> None:
    report = await arena.world.report(duty, 900)
    change(report)
    await sealed_by_all(arena, duty, report)
    refused = await refusal(stub(arena, duty).OpenEvaluation(open_request(duty, report)))
    assert field in bad_fields(refused)
    assert await state_of(arena, duty) is AssignmentState.SEALED


async def test_opening_for_somebody_else(arena: Arena, duty: AssignmentId) -> None:
    report = await arena.world.report(duty, 900)
    await sealed_by_all(arena, duty, report)
    other = (await arena.world.duties(1))[1]
    stolen = open_request(duty, report)
    assert bad_fields(await refusal(stub(arena, other).OpenEvaluation(stolen))) == ["report"]
    stolen.report.CopyFrom(sign_statement(KEYS[other.participant], report))
    assert isinstance(await refusal(stub(arena, other).OpenEvaluation(stolen)), PermissionDenied)
    short = open_request(duty, report, salt=b"short")
    assert bad_fields(await refusal(stub(arena, duty).OpenEvaluation(short))) == ["salt"]


async def test_lists_are_paged_by_round_and_validator(arena: Arena) -> None:
    for of in await arena.world.duties(1):
        await arena.world.evaluate(of, 900)
    reader = arena.peer(key_of("reader")).evaluations
    parent, found, token = f"tasks/{TASK}/submissions/1", [], ""
    while not found or token:
        page = await reader.ListEvaluations(
            evaluation_pb2.ListEvaluationsRequest(parent=parent, page_size=2, page_token=token)
        )
        found += [evaluation.name for evaluation in page.evaluations]
        token = page.next_page_token
    assert found == sorted(names.format_evaluation(of) for of in await arena.world.duties(1))
    unknown = evaluation_pb2.ListEvaluationsRequest(parent=f"tasks/{TASK}/submissions/9")
    assert isinstance(await refusal(reader.ListEvaluations(unknown)), NotFound)
    absent = evaluation_pb2.GetEvaluationRequest(name=f"{parent}/evaluations/2-{'0' * 40}")
    assert isinstance(await refusal(reader.GetEvaluation(absent)), NotFound)
    malformed = evaluation_pb2.GetEvaluationRequest(name=f"{parent}/assignments/1-{'0' * 40}")
    assert bad_fields(await refusal(reader.GetEvaluation(malformed))) == ["name"]
