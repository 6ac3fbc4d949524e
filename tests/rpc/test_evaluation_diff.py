"""`tiltyard evaluation` over a real registry: what was found, and what differs, down to a row that was recomputed."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.runtime import names
from services.runtime.names import AssignmentId
from tests.support.registry_arena import Arena, served
from tests.support.registry_world import NODES, ORIGIN, ROWS, World, key_of, model_bytes
from tiltyard.cli.evaluations import print_comparison, row_of
from tiltyard.comparing import NotComparable, compare
from tiltyard.predictions import block_hashes, handed_in, prediction_root
from tiltyard.registry.v1 import evaluation_pb2
from tiltyard.type.v1 import envelope_pb2
from tiltyard.type.v1 import evaluation_pb2 as types_pb2

RUN = np.random.default_rng(0).integers(0, 10, ROWS).astype("<i4")


def with_rows(**rows: int) -> Any:
    run = RUN.copy()
    for row, value in rows.items():
        run[int(row[1:])] = value
    return run


OTHER = with_rows(r3=(int(RUN[3]) + 1) % 10, r999=(int(RUN[999]) + 5) % 10)


@dataclass
class Evaluated:
    arena: Arena
    left: evaluation_pb2.Evaluation
    right: evaluation_pb2.Evaluation
    same: evaluation_pb2.Evaluation


async def evaluate(world: World, runs: dict[AssignmentId, Any]) -> None:
    reports: dict[AssignmentId, tuple[envelope_pb2.EvaluationReport, bytes]] = {}
    for duty, run in runs.items():
        hashes = block_hashes(run.tobytes())
        report = await world.report(duty, 900, prediction_root=prediction_root(hashes))
        await world.seal(duty, report, token=await world.accept(duty))
        reports[duty] = (report, handed_in(hashes))
    await world.turn()
    for duty, (report, hashes_bytes) in reports.items():
        await world.open(duty, report, hashes=hashes_bytes)
    await world.turn()


@pytest.fixture
async def evaluated(tmp_path: Path) -> AsyncIterator[Evaluated]:
    async with served(tmp_path) as arena:
        world = arena.world
        await world.open_task()
        await world.submit(NODES[0], model_bytes("a"))
        await world.turn()
        duties = await world.duties(1)
        await evaluate(world, dict(zip(duties, (RUN, OTHER, RUN), strict=True)))
        reader = arena.peer(key_of("reader")).evaluations
        read = [
            (
                await reader.GetEvaluation(
                    evaluation_pb2.GetEvaluationRequest(
                        name=names.format_evaluation(duty), view=evaluation_pb2.EVALUATION_VIEW_FULL
                    )
                )
            ).evaluation
            for duty in duties
        ]
        yield Evaluated(arena, *read)


async def tiltyard(evaluated: Evaluated, folder: Path, *arguments: str) -> tuple[int, str, str]:
    key = folder / "reader.pem"
    if not key.exists():
        key_of("reader").save(key)
    place = ["--key", str(key), "--origin", ORIGIN, "--registry", evaluated.arena.server.address]
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "tiltyard.cli", "evaluation", *arguments, *place],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_the_command_names_the_ranges_and_says_so_by_its_status(evaluated: Evaluated, tmp_path: Path) -> None:
    status, out, err = await tiltyard(evaluated, tmp_path, "diff", evaluated.left.name, evaluated.right.name, "--json")
    assert status == 1, err
    found = json.loads(out)
    assert found["differing_ranges"] == found["unnamed_ranges"] == [[0, 256], [768, 1000]]
    plain = await tiltyard(evaluated, tmp_path, "diff", evaluated.left.name, evaluated.right.name)
    assert "some of rows 768 to 999 differ" in plain[1]
    same = await tiltyard(evaluated, tmp_path, "diff", evaluated.left.name, evaluated.same.name)
    assert (same[0], "every block of predictions is the same" in same[1]) == (0, True)
    refused = await tiltyard(evaluated, tmp_path, "diff", evaluated.left.name, f"{evaluated.left.name[:-1]}x")
    assert refused[0] == 1
    assert refused[2].startswith("error: ")


async def test_the_list_shows_what_each_found_and_what_was_made_of_it(evaluated: Evaluated, tmp_path: Path) -> None:
    submission = evaluated.left.name.partition("/evaluations/")[0]
    status, out, err = await tiltyard(evaluated, tmp_path, "list", submission)
    assert status == 0, err
    for each in (evaluated.left, evaluated.right, evaluated.same):
        (line,) = [line for line in out.splitlines() if each.name in line]
        assert "900/1000 = 0.9000 (0.8798 to 0.9171)" in line
        assert line.rstrip().endswith("agreed")
    document = json.loads((await tiltyard(evaluated, tmp_path, "list", submission, "--json"))[1])
    assert {each["name"] for each in document["evaluations"]} == {
        each.name for each in (evaluated.left, evaluated.right, evaluated.same)
    }


def test_a_nodes_own_answers_have_a_column_of_their_own() -> None:
    evaluation = evaluation_pb2.Evaluation(name="e", report=envelope_pb2.Envelope(payload=b"r"))
    evaluation.finding.counts.total = 4
    evaluation.finding.counts.correct = 3
    evaluation.finding.counts.loss_sum_micros = 2_000_000
    evaluation.verdict = evaluation_pb2.EVALUATION_VERDICT_OUTLIER
    name, finding, by_node, ambiguous, loss, verdict = row_of(evaluation)
    assert (name, by_node, ambiguous, loss, verdict) == ("e", "", 0, "0.5000", "outlier")
    evaluation.finding.node_endpoint = True
    assert row_of(evaluation)[1:3] == ("", finding)
    evaluation.finding.fault = types_pb2.MODEL_FAULT_NAN_OUTPUT
    assert row_of(evaluation)[1:] == ("", "nan output", "", "", "outlier")
    assert row_of(evaluation_pb2.Evaluation(name="e"))[1] == "sealed"


@pytest.mark.parametrize("flipped", [False, True])
async def test_one_sides_predictions_are_enough_to_name_the_rows(evaluated: Evaluated, flipped: bool) -> None:
    left, right = (evaluated.right, evaluated.left) if flipped else (evaluated.left, evaluated.right)
    found = compare(left, right, runs=[RUN.tobytes()], outputs=10)
    assert found.recomputed == (not flipped, flipped)
    pairs = [
        (each.row, each.right, each.left) if flipped else (each.row, each.left, each.right) for each in found.named
    ]
    assert pairs == [(3, RUN[3], OTHER[3]), (999, RUN[999], OTHER[999])]
    assert found.unnamed == ()


async def test_both_sides_predictions_name_every_row_and_strange_ones_none(evaluated: Evaluated) -> None:
    both = compare(evaluated.left, evaluated.right, runs=[OTHER.tobytes(), RUN.tobytes()])
    assert [each.row for each in both.named] == [3, 999]
    neither = compare(evaluated.left, evaluated.right, runs=[with_rows(r5=99).tobytes()], outputs=10)
    assert (neither.recomputed, neither.named, neither.unnamed) == ((False, False), (), neither.ranges)


async def test_it_is_said_that_both_are_what_was_recomputed(
    evaluated: Evaluated, capsys: pytest.CaptureFixture[str]
) -> None:
    print_comparison(compare(evaluated.left, evaluated.same, runs=[RUN.tobytes()]))
    *_, left, right, last = capsys.readouterr().out.splitlines()
    assert (left, right) == tuple(f"the {side} one is exactly what was recomputed" for side in ("left", "right"))
    assert last == "every block of predictions is the same"


async def test_what_cannot_be_compared_is_told(evaluated: Evaluated) -> None:
    def changed(**fields: Any) -> evaluation_pb2.Evaluation:
        copy = evaluation_pb2.Evaluation()
        copy.CopyFrom(evaluated.right)
        for name, value in fields.items():
            target = copy if name == "prediction_hashes" else copy.finding
            setattr(target, name, value)
        return copy

    for other, why in [
        (changed(dataset_digest=bytes(32)), "different datasets"),
        (changed(model_digest=bytes(32)), "different models"),
        (changed(prediction_hashes=evaluated.left.prediction_hashes), "do not give"),
        (evaluation_pb2.Evaluation(name="hidden"), "hidden is not shown yet"),
    ]:
        with pytest.raises(NotComparable, match=why):
            compare(evaluated.left, other)
    fault = changed()
    fault.finding.fault = 1  # type: ignore[assignment]
    with pytest.raises(NotComparable, match="fault"):
        compare(evaluated.left, fault)
