"""One task from its creation to its leaderboard, played by processes that speak only gRPC."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tiltyard.cli.connection import CommandError
from tiltyard.cli.demo.data import NamedModel, Split, epochs_for, load_digits, load_npz, models_for, split
from tiltyard.cli.demo.ending import Ending, Result
from tiltyard.cli.demo.following import Judging
from tiltyard.cli.demo.reporting import Reporter
from tiltyard.cli.demo.stage import SHARD, Cast, Participant, open_stage, write_rows
from tiltyard.cli.memberships import join_task
from tiltyard.cli.supervisor import StartFailed, Supervisor
from tiltyard.cli.training_progress import describe, follow
from tiltyard.client import new_request_id, persist, watch
from tiltyard.filedigest import file_digest
from tiltyard.registry.v1 import participant_pb2, task_pb2
from tiltyard.selector.v1 import stake_pb2
from tiltyard.trainer.v1 import trainer_pb2
from tiltyard.transfers import upload
from tiltyard.type.v1 import task_pb2 as task_type_pb2

T = TypeVar("T")

MICROS = 1_000_000
VALIDATOR_MINIMUM = 100 * MICROS
TRAINING_NODE_MINIMUM = 10 * MICROS
CREATOR_STAKE = 1_000 * MICROS
STAKE_FACTORS = (1, 2, 4, 9, 16)
JUDGES = 3


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
                    cast = await open_stage(supervisor, stack, divided, validators=self.validators)
                    reporter.say(
                        f"serving: registry {cast.registry}, selector {cast.selector}, "
                        f"{self.trainers} trainers and {self.validators} validators, a process each"
                    )
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
        ending = Ending(task, self._cast, self._models, self._reporter, self._state)
        return await ending.tell(expected=len(trained), export=self._demo.export)

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
        await asyncio.to_thread(write_rows, file, rows)
        digest = task_type_pb2.DatasetDigest(
            sha256=await asyncio.to_thread(file_digest, file), size_bytes=(await asyncio.to_thread(file.stat)).st_size
        )
        request = task_pb2.CreateTaskRequest(task_id="demo", config=self._config(digest), request_id=new_request_id())
        name = (await persist(lambda: creator.tasks.CreateTask(request))).task.name
        await upload(creator.artifacts, file, task=name, digest=digest.sha256)
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
            _all(lambda each: join_task(each.client, task, "training-node"), cast.trainers),
            _all(lambda each: join_task(each.client, task, "validator"), cast.validators),
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
