"""An arena of a real registry and a real selector in which one task of each kind is told, and what it leaves behind."""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import save

from services.registry.states import AssignmentState, TaskState
from services.runtime import names
from services.runtime.names import AssignmentId
from tests.support.registry_fakes import FakeSelection
from tests.support.registry_server import ORIGIN, RegistryServer, artifact_name, digest_of, uploading
from tests.support.registry_world import CREATOR, HASHES, KEYS, NODES, VALIDATORS, key_of
from tests.support.selector_server import selecting
from tiltyard.audit import Record
from tiltyard.audit.download import fetch_record
from tiltyard.client import Client
from tiltyard.commitments import evaluation_seal, submission_commitment
from tiltyard.datasets import write_dataset
from tiltyard.identity import Key
from tiltyard.predictions import prediction_root
from tiltyard.registry.v1 import (
    artifact_pb2,
    assignment_pb2,
    evaluation_pb2,
    leaderboard_pb2,
    participant_pb2,
    submission_pb2,
    task_pb2,
)
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2, model_pb2, participation_pb2
from tiltyard.type.v1 import evaluation_pb2 as type_pb2
from tiltyard.type.v1 import task_pb2 as type_task_pb2

ROWS = 50
SALT = bytes(range(32))
_DAY_S = 86400


@dataclass(frozen=True)
class Told:
    """What an arena leaves behind."""

    record: Record
    boards: dict[str, leaderboard_pb2.Leaderboard]
    log_key: Key


class ToldArena:
    """Scripted participants of one registry: they call it as anybody does, and validators count what they are told."""

    def __init__(self, server: RegistryServer) -> None:
        self.server = server
        self._clients: dict[str, Client] = {}

    async def gather(self) -> None:
        """Everybody registers. One is owned by somebody who need not register, and says a word for the creator."""
        owner, owned = key_of("owner"), key_of("owned")
        for key in (CREATOR, *NODES, *VALIDATORS, owned):
            client = self._clients[key.id] = await self.server.client(key)
            request = participant_pb2.RegisterParticipantRequest(display_name=f"name of {key.id[:4]}")
            await client.participants.RegisterParticipant(request)
        owning = envelope_pb2.OwnerStatement(
            origin=ORIGIN, owner=f"participants/{owner.id}", participant=f"participants/{owned.id}"
        )
        await self._clients[owned.id].participants.BindOwner(
            participant_pb2.BindOwnerRequest(statement=sign_statement(owner, owning))
        )
        word = envelope_pb2.EndorsementStatement(
            origin=ORIGIN, endorser=f"participants/{owned.id}", subject=f"participants/{CREATOR.id}", field="digits"
        )
        await self._clients[owned.id].participants.EndorseParticipant(
            participant_pb2.EndorseParticipantRequest(statement=sign_statement(owned, word))
        )

    async def be_away(self) -> None:
        """The registry is away for a minute."""

        async def has_beaten() -> bool:
            return await self.server.registry.store.read(lambda tx: tx.alive_time()) is not None

        await self.until(has_beaten)
        await self.server.stop()
        self.server.clock.advance(seconds=60)
        await self.server.start()

    @property
    def creator(self) -> Client:
        """Who posts all tasks."""
        return self._clients[CREATOR.id]

    async def until(self, ready: Callable[[], Awaitable[bool]]) -> None:
        """Let the background loop go on until it is so."""
        for _ in range(100):
            if await ready():
                return
            await self.server.registry.referee.turn()
        raise AssertionError("the referee never comes to it")

    async def create(self, task: str, *, validators: int = 3, regression: bool = False, **config: Any) -> None:
        """A task that is open, with all nodes and some validators in it."""
        dataset = dataset_of(self.server.folder, task, regression=regression)
        wanted = type_task_pb2.TaskConfig(
            display_name=task,
            models=[model_pb2.ModelSpec(input_shape=[4], outputs=1 if regression else 3, linear=model_pb2.Linear())],
            evaluation_dataset=digest_of(dataset),
            **config,
        )
        await self.server.open_task(self.creator, dataset, task=task, config=wanted)
        for key, role in (
            *((node, participation_pb2.ROLE_TRAINING_NODE) for node in NODES),
            *((validator, participation_pb2.ROLE_VALIDATOR) for validator in VALIDATORS[:validators]),
        ):
            await self.server.join(self._clients[key.id], role, task=task)

    async def commit(self, task: str, node: Key, model: bytes) -> int:
        """Commit to a model and upload it; the submission's number."""
        statement = envelope_pb2.CommitStatement(
            origin=ORIGIN,
            task=names.format_task(task),
            participant=names.format_participant(node.id),
            commitment=submission_commitment(
                origin=ORIGIN,
                task=names.format_task(task),
                participant=names.format_participant(node.id),
                model_digest=hashlib.sha256(model).digest(),
                salt=SALT,
            ),
        )
        request = submission_pb2.CommitSubmissionRequest(statement=sign_statement(node, statement))
        client = self._clients[node.id]
        name = (await client.submissions.CommitSubmission(request)).submission.name
        await self.server.upload(client, model, submission=name)
        return names.parse_submission(name)[1]

    async def reveal(self, task: str, node: Key, number: int, model: bytes) -> None:
        """Open the commitment."""
        statement = envelope_pb2.RevealStatement(
            origin=ORIGIN,
            submission=names.format_submission(task, number),
            model_digest=hashlib.sha256(model).digest(),
            salt=SALT,
            format=model_pb2.MODEL_FORMAT_SAFETENSORS,
        )
        request = submission_pb2.RevealSubmissionRequest(statement=sign_statement(node, statement))
        await self._clients[node.id].submissions.RevealSubmission(request)

    async def submit(self, task: str, node: Key, model: bytes) -> int:
        """Commit, upload, reveal."""
        number = await self.commit(task, node, model)
        await self.reveal(task, node, number, model)
        return number

    async def judge(self, task: str, number: int, *findings: int | str, round_: int = 1) -> None:
        """Let as many validators as there are findings be offered it, find these, seal and open them."""

        async def offered() -> bool:
            return len(await self._duties(task, number, round_, AssignmentState.OFFERED)) == len(findings)

        await self.until(offered)
        duties = await self._duties(task, number, round_, AssignmentState.OFFERED)
        reports = [await self._seal(duty, found) for duty, found in zip(duties, findings, strict=True)]

        async def asked() -> bool:
            sealed = await self._duties(task, number, round_, AssignmentState.SEALED, opening=True)
            return set(duties) <= set(sealed)

        await self.until(asked)
        for duty, report in zip(duties, reports, strict=True):
            await self._open(duty, report)

    async def close(self, task: str) -> None:
        """No more submissions."""
        await self.creator.tasks.CloseTask(task_pb2.CloseTaskRequest(name=names.format_task(task)))

    async def over(self, task: str, state: TaskState = TaskState.FINAL) -> None:
        """Wait until all is judged and ranked (or it is cancelled), and everybody has the stake back."""

        async def is_over() -> bool:
            found = await self.server.registry.store.read(lambda tx: tx.task(task))
            return found is not None and found.state is state and not found.pool_open

        await self.until(is_over)

    async def ended(self, task: str, number: int, *, round_: int = 1) -> None:
        """Wait until a submission's round has been concluded, or the submission rejected."""

        async def has_ended() -> bool:
            found = await self.server.registry.store.read(lambda tx: tx.submission(task, number))
            assert found is not None
            return found.reason is not None or round_ in found.scores

        await self.until(has_ended)

    async def hand_in(self, content: bytes) -> str:
        """A base model of the creator's."""
        header = artifact_pb2.UploadHeader(artifact=artifact_name(content), size_bytes=len(content), base_model=True)
        return (await self.creator.artifacts.UploadArtifact(uploading(header, content))).artifact.name

    async def told(self) -> Told:
        """The whole log once no ledger event is missing, and the rankings that the registry shows."""

        async def quiet() -> bool:
            before = len((await fetch_record(self.creator)).leaves)
            await self.server.registry.referee.turn()
            return len((await fetch_record(self.creator)).leaves) == before

        await self.until(quiet)
        record = await fetch_record(self.creator)
        boards = {}
        for _, entry in record.of_kind("task_created"):
            request = leaderboard_pb2.GetLeaderboardRequest(task=entry.task_created.task)
            boards[entry.task_created.task.removeprefix("tasks/")] = (
                await self.creator.leaderboard.GetLeaderboard(request)
            ).leaderboard
        return Told(record, boards, Key.load(self.server.folder / "state" / "log.pem"))

    async def _duties(
        self, task: str, number: int, round_: int, state: AssignmentState, *, opening: bool = False
    ) -> Sequence[AssignmentId]:
        found = await self.server.registry.store.read(lambda tx: tx.assignments(task, number, round_))
        return [
            AssignmentId(each.task, each.number, each.round, each.validator)
            for each in found
            if each.state is state and each.opening >= opening
        ]

    async def _seal(self, duty: AssignmentId, finding: int | str) -> envelope_pb2.EvaluationReport:
        key, name = KEYS[duty.participant], names.format_assignment(duty)
        client = self._clients[key.id]
        accepted = await client.assignments.AcceptAssignment(
            assignment_pb2.AcceptAssignmentRequest(name=name, lease_holder=bytes(32))
        )
        config = (await client.tasks.GetTask(task_pb2.GetTaskRequest(name=names.format_task(duty.task)))).task.config
        dataset = config.evaluation_dataset if duty.round == 1 else config.holdout
        asked = submission_pb2.GetSubmissionRequest(name=names.format_submission(duty.task, duty.number))
        submission = (await client.submissions.GetSubmission(asked)).submission
        report = envelope_pb2.EvaluationReport(
            origin=ORIGIN,
            assignment=name,
            dataset_digest=dataset.sha256,
            model_digest=submission.model_digest,
        )
        if isinstance(finding, int):
            report.counts.CopyFrom(type_pb2.Counts(correct=finding, total=ROWS))
            report.prediction_root, report.prediction_blocks = prediction_root(HASHES[:1]), 1
        else:
            report.fault = type_pb2.ModelFault.Value(f"MODEL_FAULT_{finding}")
        seal = evaluation_seal(assignment=name, report=sign_statement(key, report).payload, salt=SALT)
        statement = envelope_pb2.SealStatement(origin=ORIGIN, assignment=name, seal=seal)
        await client.evaluations.CommitEvaluation(
            evaluation_pb2.CommitEvaluationRequest(
                statement=sign_statement(key, statement), lease_token=accepted.lease_token
            )
        )
        return report

    async def _open(self, duty: AssignmentId, report: envelope_pb2.EvaluationReport) -> None:
        key = KEYS[duty.participant]
        request = evaluation_pb2.OpenEvaluationRequest(
            report=sign_statement(key, report),
            salt=SALT,
            prediction_hashes=b"".join(HASHES[: report.prediction_blocks]),
        )
        await self._clients[key.id].evaluations.OpenEvaluation(request)


def dataset_of(folder: Path, name: str, *, regression: bool = False) -> bytes:
    """The dataset of one task, by its name."""
    numbers = np.random.default_rng(list(name.encode()))
    y = numbers.random(ROWS).astype(np.float32) if regression else numbers.integers(0, 3, ROWS)
    path = folder / f"{name}.safetensors"
    write_dataset(path, numbers.random((ROWS, 4)).astype(np.float32), y)
    return path.read_bytes()


def model_of(name: str, *, outputs: int = 3) -> bytes:
    """A linear model, by its name."""
    numbers = np.random.default_rng(list(name.encode()))
    tensors = {"head.weight": numbers.random((outputs, 4)), "head.bias": numbers.random(outputs)}
    return save({each: values.astype(np.float32) for each, values in tensors.items()})


async def tell_tasks(folder: Path, export: Callable[[RegistryServer, str], Awaitable[None]]) -> Told:
    """One task of each kind, exported by `export` when all have been told."""
    server = RegistryServer(folder)
    async with selecting(folder, server.clock) as selector:
        # It is asked for what the Protocol says, and both fulfil it.
        server.selection = cast(FakeSelection, selector)
        await server.start()
        try:
            arena = ToldArena(server)
            await arena.be_away()
            await arena.gather()
            # A membership takes all of a stake: the one task that does not end comes last.
            for tell in (
                _dispute,
                _ladder,
                _holdout,
                _unpublished,
                _cancelled,
                _regression,
                _top_k,
                _base_model,
                _hidden,
            ):
                await tell(arena)
            told = await arena.told()
            for task in told.boards:
                await export(server, task)
            return told
        finally:
            await server.stop()


async def _dispute(arena: ToldArena) -> None:
    """A dispute, a copy that was scored before, a late reveal, a fault, ambiguity, a refused structure."""
    await arena.create("dispute", validators=12, tolerance=1, limits=type_task_pb2.TaskLimits(daily_submissions=20))
    disputed = await arena.submit("dispute", NODES[0], model_of("disputed"))
    await arena.judge("dispute", disputed, 40, 41, 5)
    await arena.judge("dispute", disputed, 40, 40, 41, 40, 40, 41, 40)
    await arena.ended("dispute", disputed)
    # The original is committed first and revealed last.
    original = await arena.commit("dispute", NODES[1], model_of("copied"))
    copy = await arena.submit("dispute", NODES[2], model_of("copied"))
    await arena.judge("dispute", copy, 44, 44, 44)
    await arena.ended("dispute", copy)
    await arena.reveal("dispute", NODES[1], original, model_of("copied"))
    await arena.judge("dispute", original, 44, 44, 44)
    await arena.ended("dispute", original)
    fault = await arena.submit("dispute", NODES[1], model_of("fault"))
    await arena.judge("dispute", fault, "NAN_OUTPUT", "NAN_OUTPUT", "NAN_OUTPUT")
    await arena.ended("dispute", fault)
    ambiguous = await arena.submit("dispute", NODES[1], model_of("ambiguous"))
    await arena.judge("dispute", ambiguous, "NAN_OUTPUT", "CRASHED", "TOO_SLOW")
    await arena.judge("dispute", ambiguous, *["NAN_OUTPUT", "CRASHED"] * 3, "TOO_SLOW")
    await arena.ended("dispute", ambiguous)
    unfit = await arena.submit("dispute", NODES[1], model_of("unfit", outputs=2))
    await arena.ended("dispute", unfit)
    late = await arena.commit("dispute", NODES[1], model_of("late"))
    await arena.server.advance(seconds=3600)
    await arena.ended("dispute", late)
    await arena.close("dispute")
    await arena.over("dispute")


async def _ladder(arena: ToldArena) -> None:
    """Scores that are committed to, and opened at close; one of them after a dispute."""
    visibility = type_task_pb2.SCORE_VISIBILITY_LADDER
    await arena.create("ladder", validators=12, score_visibility=visibility, ladder_step_micros=100_000)
    for count, node in ((30, NODES[0]), (31, NODES[0]), (41, NODES[1])):
        number = await arena.submit("ladder", node, model_of(f"ladder {count}"))
        await arena.judge("ladder", number, count, count, count)
        await arena.ended("ladder", number)
    disputed = await arena.submit("ladder", NODES[2], model_of("ladder disputed"))
    await arena.judge("ladder", disputed, 20, 20, 3)
    await arena.judge("ladder", disputed, *[20] * 7)
    await arena.ended("ladder", disputed)
    await arena.close("ladder")
    await arena.over("ladder")


async def _hidden(arena: ToldArena) -> None:
    """A score that is committed to, and not opened yet."""
    visibility = type_task_pb2.SCORE_VISIBILITY_LADDER
    await arena.create("hidden", score_visibility=visibility)
    number = await arena.submit("hidden", NODES[0], model_of("hidden"))
    await arena.judge("hidden", number, 30, 30, 30)
    await arena.ended("hidden", number)


async def _holdout(arena: ToldArena) -> None:
    """A holdout that turns the ranking round."""
    dataset = dataset_of(arena.server.folder, "holdout of holdout")
    await arena.create("holdout", holdout=digest_of(dataset))
    numbers = []
    for count, node in ((45, NODES[0]), (40, NODES[1])):
        numbers.append(await arena.submit("holdout", node, model_of(f"holdout {count}")))
        await arena.judge("holdout", numbers[-1], count, count, count)
        await arena.ended("holdout", numbers[-1])
    await arena.close("holdout")
    await arena.server.upload(arena.creator, dataset, task="tasks/holdout")
    await arena.creator.tasks.PublishHoldout(task_pb2.PublishHoldoutRequest(name="tasks/holdout"))
    for number, count in zip(numbers, (20, 38), strict=True):
        await arena.judge("holdout", number, count, count, count, round_=2)
        await arena.ended("holdout", number, round_=2)
    await arena.over("holdout")


async def _unpublished(arena: ToldArena) -> None:
    """A holdout that never came."""
    await arena.create("unpublished", holdout=digest_of(b"never seen"))
    number = await arena.submit("unpublished", NODES[0], model_of("unpublished"))
    await arena.judge("unpublished", number, 33, 33, 33)
    await arena.ended("unpublished", number)
    await arena.close("unpublished")
    await arena.server.advance(seconds=_DAY_S)
    await arena.over("unpublished")


async def _cancelled(arena: ToldArena) -> None:
    """Cancelled with a scored submission whose score was hidden, one that is judged, one not revealed."""
    visibility = type_task_pb2.SCORE_VISIBILITY_LADDER
    await arena.create("cancelled", score_visibility=visibility)
    scored = await arena.submit("cancelled", NODES[0], model_of("cancelled scored"))
    await arena.judge("cancelled", scored, 30, 30, 30)
    await arena.ended("cancelled", scored)
    judged = await arena.submit("cancelled", NODES[1], model_of("cancelled judged"))
    await arena.commit("cancelled", NODES[2], model_of("cancelled committed"))

    async def drawn() -> bool:
        return bool(await arena._duties("cancelled", judged, 1, AssignmentState.OFFERED))

    await arena.until(drawn)
    await arena.creator.tasks.CancelTask(
        task_pb2.CancelTaskRequest(name="tasks/cancelled", reason="a mistake in the data")
    )
    await arena.over("cancelled", TaskState.CANCELLED)


async def _regression(arena: ToldArena) -> None:
    """Targets within a bound."""
    await arena.create(
        "regression",
        regression=True,
        loss=type_task_pb2.LOSS_MSE,
        metric=type_task_pb2.METRIC_WITHIN_BOUND,
        bound=0.25,
    )
    number = await arena.submit("regression", NODES[0], model_of("regression", outputs=1))
    await arena.judge("regression", number, 25, 25, 25)
    await arena.ended("regression", number)
    await arena.close("regression")
    await arena.over("regression")


async def _top_k(arena: ToldArena) -> None:
    """The label among the two largest outputs."""
    await arena.create("top-k", metric=type_task_pb2.METRIC_TOP_K_ACCURACY, top_k=2)
    for count, node in ((35, NODES[0]), (36, NODES[1]), (36, NODES[2])):
        number = await arena.submit("top-k", node, model_of(f"top-k {node.id}"))
        await arena.judge("top-k", number, count, count, count)
        await arena.ended("top-k", number)
    await arena.close("top-k")
    await arena.over("top-k")


async def _base_model(arena: ToldArena) -> None:
    """Training that starts from a model, amended before its end."""
    base = await arena.hand_in(model_of("base"))
    await arena.create("base-model", base_model=base)
    number = await arena.submit("base-model", NODES[0], model_of("tuned"))
    later = task_pb2.Task(name="tasks/base-model")
    later.config.description = "Longer than it was."
    later.config.schedule.close_time.FromDatetime(arena.server.clock() + timedelta(days=20))
    request = task_pb2.UpdateTaskRequest(task=later)
    request.update_mask.FromJsonString("config.description,config.schedule.closeTime")
    await arena.creator.tasks.UpdateTask(request)
    await arena.judge("base-model", number, 48, 48, 48)
    await arena.ended("base-model", number)
    await arena.close("base-model")
    await arena.over("base-model")
