"""One task from its creation to its leaderboard, played by processes that speak only gRPC."""

import asyncio
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tiltyard.cli import tasks as task_commands
from tiltyard.cli.connection import DEFAULT_ORIGIN, CommandError
from tiltyard.cli.demo.data import NamedModel, Rows, Split, epochs_for, load_digits, load_npz, models_for, split
from tiltyard.cli.demo.following import Judging
from tiltyard.cli.demo.reporting import Reporter
from tiltyard.cli.demo.verification import Record, fetch_record, verify
from tiltyard.cli.output import as_json
from tiltyard.cli.supervisor import Program, StartFailed, Supervisor, free_ports
from tiltyard.cli.training import describe, follow
from tiltyard.cli.up import DATA_FOLDER, arena_programs, node_program
from tiltyard.client import PATIENCE_S, Client, Node, new_request_id, pages, persist, watch
from tiltyard.datasets import write_dataset
from tiltyard.identity import Key
from tiltyard.registry.v1 import leaderboard_pb2, participant_pb2, submission_pb2, task_pb2
from tiltyard.selector.v1 import stake_pb2
from tiltyard.trainer.v1 import trainer_pb2
from tiltyard.transfers import file_digest, upload
from tiltyard.type.v1 import evaluation_pb2
from tiltyard.type.v1 import task_pb2 as task_type_pb2

T = TypeVar("T")

MICROS = 1_000_000
VALIDATOR_MINIMUM = 100 * MICROS
TRAINING_NODE_MINIMUM = 10 * MICROS
CREATOR_STAKE = 1_000 * MICROS
STAKE_FACTORS = (1, 2, 4, 9, 16)
JUDGES = 3
SHARD = "shard.safetensors"


@dataclass(frozen=True)
class Participant:
    """A key with a name for people and its clients; `node` and `model_index` where it runs a node."""

    name: str
    client: Client
    node: Node | None = None
    model_index: int = 0


@dataclass(frozen=True)
class Result:
    """What came out: the object of `--json`, and whether everything was scored and everything checked is right."""

    document: dict[str, Any]
    succeeded: bool


@dataclass(frozen=True)
class Demo:
    """The demo's options, and `play` to run it."""

    data: Path | None
    trainers: int
    validators: int
    export: Path | None
    json: bool
    state: Path | None

    async def play(self) -> Result:
        """Runs the whole task. Raises CommandError when it cannot come to its end."""
        state = await asyncio.to_thread(self._state_folder)
        with Reporter(to_stderr=self.json) as reporter:
            reporter.say(f"state, keys and logs lie in {state}")
            rows = await asyncio.to_thread(load_npz, self.data) if self.data else await asyncio.to_thread(load_digits)
            divided = await asyncio.to_thread(split, rows, shards=self.trainers)
            async with AsyncExitStack() as stack:
                supervisor = await stack.enter_async_context(Supervisor(state, report=reporter.say))
                try:
                    cast = await _open_stage(self, supervisor, stack, divided, reporter)
                    return await _Play(self, reporter, cast, divided, state).run()
                except StartFailed as error:
                    raise CommandError(str(error)) from None

    def _state_folder(self) -> Path:
        if self.state is None:
            return Path(tempfile.mkdtemp(prefix="tiltyard-demo-"))
        state = self.state.absolute()
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        if any(state.iterdir()):
            raise CommandError(f"{state} is not empty; the demo starts with an arena of its own")
        return state


@dataclass(frozen=True)
class Cast:
    """Everybody on stage."""

    operator: Participant
    creator: Participant
    trainers: tuple[Participant, ...]
    validators: tuple[Participant, ...]

    @property
    def members(self) -> tuple[Participant, ...]:
        """Who joins the task."""
        return self.trainers + self.validators

    def name_of(self, participant: str) -> str:
        """The name for people of a participants/{id}."""
        everybody = (self.operator, self.creator, *self.members)
        return next((each.name for each in everybody if each.client.participant == participant), participant)


async def _open_stage(
    demo: Demo, supervisor: Supervisor, stack: AsyncExitStack, divided: Split, reporter: Reporter
) -> Cast:
    """Starts all processes at once and connects everybody."""
    ports = free_ports(2 + demo.trainers + demo.validators)
    operator = Key.load_or_create(supervisor.folder("operator") / "key.pem")
    creator = Key.load_or_create(supervisor.folder("creator") / "key.pem")
    registry, selector = arena_programs(
        supervisor, registry_port=ports[0], selector_port=ports[1], operator=operator.id, origin=DEFAULT_ORIGIN
    )
    cores = os.cpu_count() or 1
    threads = {"TRAINING_THREADS": str(max(1, cores // demo.trainers))}
    names = [("trainer", f"trainer-{n}") for n in range(1, demo.trainers + 1)]
    names += [("validator", f"validator-{n}") for n in range(1, demo.validators + 1)]
    nodes = [
        node_program(
            supervisor,
            name,
            kind=kind,
            port=port,
            registry=registry.address,
            operator=operator.id,
            origin=DEFAULT_ORIGIN,
            settings=threads if kind == "trainer" else {},
        )
        for (kind, name), port in zip(names, ports[2:], strict=True)
    ]
    for program, shard in zip(nodes, divided.shards, strict=False):
        folder = supervisor.folder(program.name) / DATA_FOLDER
        await asyncio.to_thread(_write_rows, folder / SHARD, shard)
    await supervisor.start([registry, selector, *nodes])

    def join(name: str, key: Key, program: Program | None = None, model_index: int = 0) -> Participant:
        client = Client(key, origin=DEFAULT_ORIGIN, registry=registry.address, selector=selector.address)
        stack.push_async_callback(client.close)
        if program is None:
            return Participant(name, client)
        node = Node(key, address=program.address, node_id=key.id)
        stack.push_async_callback(node.close)
        return Participant(name, client, node, model_index)

    members = [
        join(program.name, Key.load(supervisor.folder(program.name) / "key.pem"), program, place)
        for place, program in enumerate(nodes)
    ]
    cast = Cast(
        operator=join("operator", operator),
        creator=join("creator", creator),
        trainers=tuple(members[: demo.trainers]),
        validators=tuple(members[demo.trainers :]),
    )
    await supervisor.until_serving()
    reporter.say(
        f"serving: registry {registry.address}, selector {selector.address}, "
        f"{demo.trainers} trainers and {demo.validators} validators, a process each"
    )
    return cast


def _write_rows(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_dataset(path, rows.x, rows.y, labels=rows.labels)


async def _all(do: Callable[[Participant], Awaitable[T]], whom: Sequence[Participant]) -> list[T]:
    return list(await asyncio.gather(*(do(each) for each in whom)))


class _Play:
    def __init__(self, demo: Demo, reporter: Reporter, cast: Cast, divided: Split, state: Path) -> None:
        self._demo = demo
        self._reporter = reporter
        self._cast = cast
        self._divided = divided
        self._state = state
        self._models: list[NamedModel] = models_for(divided)

    async def run(self) -> Result:
        await self._register_and_deposit()
        task = await self._create_task()
        await self._join(task)
        judging = Judging(task, self._cast.creator.client, self._reporter, self._cast.name_of)
        following = asyncio.create_task(judging.follow())
        try:
            trained = await _all(lambda each: self._train(each, task), self._cast.trainers)
            await self._close(task)
            await judging.until_final()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        if not following.cancelled():
            following.result()
        return await self._conclude(task, trained)

    async def _register_and_deposit(self) -> None:
        cast = self._cast
        everybody = [cast.operator, cast.creator, *cast.members]

        async def register(who: Participant) -> None:
            request = participant_pb2.RegisterParticipantRequest(display_name=who.name, request_id=new_request_id())
            await persist(lambda: who.client.participants.RegisterParticipant(request))

        async def deposit(who: Participant) -> None:
            request = stake_pb2.DepositRequest(
                participant=who.client.participant,
                amount_micros=self._stake_of(who),
                reference=f"demo {who.name}",
                funding_account=f"account of {who.name}",
                request_id=new_request_id(),
            )
            await persist(lambda: cast.operator.client.stakes.Deposit(request))

        await asyncio.gather(_all(register, everybody), _all(deposit, [cast.creator, *cast.members]))
        stakes = ", ".join(f"{each.name} {self._stake_of(each) // MICROS}" for each in cast.validators)
        self._reporter.say(f"{len(everybody)} participants registered; stakes of the validators: {stakes}")

    def _stake_of(self, who: Participant) -> int:
        if who in self._cast.validators:
            place = self._cast.validators.index(who)
            return VALIDATOR_MINIMUM * STAKE_FACTORS[place % len(STAKE_FACTORS)]
        return TRAINING_NODE_MINIMUM if who in self._cast.trainers else CREATOR_STAKE

    async def _create_task(self) -> str:
        creator, rows = self._cast.creator.client, self._divided.evaluation
        file = self._state / "creator" / "evaluation.safetensors"
        await asyncio.to_thread(_write_rows, file, rows)
        digest = task_type_pb2.DatasetDigest(
            sha256=await asyncio.to_thread(file_digest, file), size_bytes=(await asyncio.to_thread(file.stat)).st_size
        )
        request = task_pb2.CreateTaskRequest(task_id="demo", config=self._config(digest), request_id=new_request_id())
        name = (await persist(lambda: creator.tasks.CreateTask(request))).task.name
        await upload(creator.artifacts, file, task=name)
        task = await self._watch_task(name, lambda seen: seen.state != task_type_pb2.TASK_STATE_PREPARING)
        if task.state != task_type_pb2.TASK_STATE_OPEN:
            raise CommandError(f"{name} was cancelled: {task.state_reason}")
        shape = " x ".join(map(str, rows.x.shape[1:]))
        self._reporter.say(
            f"{name} is open: {rows.name}, {shape} {rows.x.dtype}, {rows.classes} classes, "
            f"{task.evaluation_rows} hidden rows; models {', '.join(model.name for model in self._models)}"
        )
        return name

    def _config(self, digest: task_type_pb2.DatasetDigest) -> task_type_pb2.TaskConfig:
        rows = self._divided.evaluation
        config = task_type_pb2.TaskConfig(
            display_name=rows.name[:100],
            description="Made by `tiltyard demo`.",
            models=[model.spec for model in self._models],
            evaluation_dataset=digest,
            validators_per_submission=min(JUDGES, self._demo.validators),
            class_names=rows.labels,
        )
        config.selection.validator_min_stake_micros = VALIDATOR_MINIMUM
        config.selection.training_node_min_stake_micros = TRAINING_NODE_MINIMUM
        return config

    async def _watch_task(self, name: str, wanted: Callable[[task_pb2.Task], bool]) -> task_pb2.Task:
        tasks = self._cast.creator.client.tasks
        async for seen in watch(tasks.WatchTask, task_pb2.WatchTaskRequest(name=name)):
            if wanted(seen.task):
                return seen.task
        raise CommandError(f"{name} has ended too early")

    async def _join(self, task: str) -> None:
        cast = self._cast
        await asyncio.gather(
            _all(lambda each: task_commands.join_task(each.client, task, "training-node"), cast.trainers),
            _all(lambda each: task_commands.join_task(each.client, task, "validator"), cast.validators),
        )
        await self._watch_task(
            task,
            lambda seen: seen.training_nodes >= len(cast.trainers) and seen.validators >= len(cast.validators),
        )
        self._reporter.say(f"{len(cast.trainers)} training nodes and {len(cast.validators)} validators have joined")

    async def _train(self, who: Participant, task: str) -> trainer_pb2.Training:
        assert who.node is not None
        node, index = who.node, who.model_index % len(self._models)
        shard = self._divided.shards[who.model_index]
        request = trainer_pb2.StartTrainingRequest(
            task=task,
            model_index=index,
            dataset=SHARD,
            config=trainer_pb2.TrainingConfig(epochs=epochs_for(len(shard.y)), batch_size=32, seed=who.model_index + 1),
            submit=True,
            request_id=new_request_id(),
        )
        started = (await persist(lambda: node.trainings.StartTraining(request))).training
        job = f"{who.name} trains {self._models[index].name} on {len(shard.y)} rows"
        training = started
        async for training in follow(node, started.name):
            if training.progress.total_steps:
                self._reporter.show(job, training.progress.step, training.progress.total_steps, describe(training))
        self._reporter.done(job)
        if training.state != trainer_pb2.TRAINING_STATE_SUCCEEDED:
            raise CommandError(f"the training of {who.name} did not succeed: {training.error or 'it was cancelled'}")
        self._reporter.say(f"{who.name} submitted {training.submission}: {describe(training)}")
        return training

    async def _close(self, task: str) -> None:
        request = task_pb2.CloseTaskRequest(name=task, request_id=new_request_id())
        await persist(lambda: self._cast.creator.client.tasks.CloseTask(request))

    async def _conclude(self, task: str, trained: Sequence[trainer_pb2.Training]) -> Result:
        client, reporter, cast = self._cast.creator.client, self._reporter, self._cast
        board_request = leaderboard_pb2.GetLeaderboardRequest(task=task)
        board = (await persist(lambda: client.leaderboard.GetLeaderboard(board_request))).leaderboard
        listing = submission_pb2.ListSubmissionsRequest(parent=task, page_size=1000)
        submissions = [
            each
            async for page in pages(client.submissions.ListSubmissions, listing, patience_s=PATIENCE_S)
            for each in page.submissions
        ]
        reporter.say("leaderboard:")
        for entry in board.entries:
            reporter.say(
                f"  {entry.rank}. {entry.display_name:<12} {entry.correct}/{entry.total} "
                f"= {entry.correct / entry.total:.4f}  ({entry.interval_low:.4f} to {entry.interval_high:.4f})"
            )
        record = await fetch_record(client)
        checks = await asyncio.to_thread(verify, record, task, submissions, board)
        for check in checks:
            reporter.say(f"{'verified' if check.passed else 'NOT VERIFIED'}: {check.claim}")
            if not check.passed:
                reporter.say(f"  {check.detail}")
        scored = [each for each in submissions if each.state == evaluation_pb2.SUBMISSION_STATE_SCORED]
        for each in submissions:
            if each.state != evaluation_pb2.SUBMISSION_STATE_SCORED:
                reason = evaluation_pb2.RejectionReason.Name(each.reason)
                reporter.say(f"{each.name} was not scored: {reason} {each.detail}")
        succeeded = len(scored) == len(trained) and all(check.passed for check in checks)
        document = {
            "task": task,
            "seconds": round(reporter.seconds, 3),
            "submissions": [self._submission(each) for each in submissions],
            "leaderboard": [{**as_json(each), "correct": each.correct, "total": each.total} for each in board.entries],
            "verified": {check.claim: check.passed for check in checks},
            "state": str(self._state),
        }
        if self._demo.export:
            await self._export(self._demo.export, task, record, document)
        reporter.say(
            f"{'done' if succeeded else 'FAILED'} in {reporter.seconds:.1f} s; "
            f"state, keys and logs of {2 + len(cast.members)} processes lie in {self._state}"
        )
        return Result(document, succeeded)

    def _submission(self, each: submission_pb2.Submission) -> dict[str, Any]:
        is_scored = each.state == evaluation_pb2.SUBMISSION_STATE_SCORED
        document: dict[str, Any] = {
            "name": each.name,
            "participant": each.participant,
            "display_name": self._cast.name_of(each.participant),
            "model": self._models[each.model_index].name,
            "state": evaluation_pb2.SubmissionState.Name(each.state).removeprefix("SUBMISSION_STATE_"),
            "accuracy": each.score.correct / each.score.total if is_scored and each.score.total else None,
            "correct": each.score.correct if is_scored else None,
            "total": each.score.total if is_scored else None,
            "validators": list(each.validators),
        }
        if each.reason:
            document["reason"] = evaluation_pb2.RejectionReason.Name(each.reason).removeprefix("REJECTION_REASON_")
        return document

    async def _export(self, folder: Path, task: str, record: Record, document: dict[str, Any]) -> None:
        await asyncio.to_thread(_export_record, folder, record)
        count = await task_commands.fetch_results(self._cast.creator.client, task, folder / "models")
        await asyncio.to_thread((folder / "demo.json").write_text, json.dumps(document, indent=2) + "\n")
        self._reporter.say(f"log, draws and {count} models exported to {folder}")


def _export_record(folder: Path, record: Record) -> None:
    log, draws = folder / "log", folder / "draws"
    log.mkdir(parents=True, exist_ok=True)
    draws.mkdir(parents=True, exist_ok=True)
    (log / "checkpoint").write_text(record.checkpoint.note)
    # Each leaf as it was hashed, after its length in four big-endian bytes.
    (log / "leaves").write_bytes(b"".join(len(leaf).to_bytes(4, "big") + leaf for leaf in record.leaves))
    for receipt in record.draws():
        name = receipt.draw.removeprefix("draws/").replace("/", "-")
        (draws / f"{name}.json").write_text(json.dumps(as_json(receipt), indent=2) + "\n")
