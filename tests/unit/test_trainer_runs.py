"""The queue: who runs on which device, and what outlasts a full disk and an absent database."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from services.runtime.errors import (
    ArenaError,
    DiskFull,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from services.trainer import fulldisk
from services.trainer.config import LossKind, TrainingConfig
from services.trainer.ends import Broken, Died, End, Note, Trained
from services.trainer.live import LiveTrainings
from services.trainer.patience import persist
from services.trainer.progress import Progress
from services.trainer.runs import Runs
from services.trainer.training import ENDED, Training, TrainingState
from services.trainer.trainings import Trainings
from tiltyard.modelspec import Linear, ModelSpec

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FULL = OSError(errno.ENOSPC, "No space left on device")


def training(name: str, **fields: object) -> Training:
    plain = Training(
        id=name,
        task="",
        model_index=0,
        dataset="d",
        dataset_mark="",
        spec=ModelSpec((1,), 2, Linear()),
        loss=LossKind.CROSS_ENTROPY,
        config=TrainingConfig(),
        submit=False,
        created_at=NOW,
    )
    return replace(plain, **fields)  # type: ignore[arg-type]


class Store:
    """Trainings in memory; `away` is how many more times it cannot be written to."""

    def __init__(self) -> None:
        self.trainings: dict[str, Training] = {}
        self.histories: dict[str, Sequence[Progress]] = {}
        self.away = 0
        self.damaged: set[str] = set()
        self.trouble: ArenaError = Unavailable("DATABASE_UNAVAILABLE", "the database cannot be used at present")

    def _write(self) -> None:
        if self.away:
            self.away -= 1
            raise self.trouble

    async def get(self, training: str) -> Training:
        if training not in self.trainings:
            raise NotFound("TRAINING_NOT_FOUND", training)
        return self.trainings[training]

    async def unended(self) -> Sequence[Training]:
        return [each for each in self.trainings.values() if not each.ended]

    async def change(self, training: str, change: Callable[[Training], Training], *, answers: bool = False) -> Training:
        self._write()
        if training in self.damaged:
            raise ValueError("the row is damaged")
        self.trainings[training] = change(self.trainings[training])
        return self.trainings[training]

    async def history(self, training: str) -> Sequence[Progress]:
        return self.histories.get(training, [])

    async def keep_history(self, training: str, points: Sequence[Progress]) -> None:
        self._write()
        self.histories[training] = points


class Children:
    """Processes that end when the test says so; `refusals` are raised by the next starts."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[str, asyncio.Future[End]]] = {}
        self.started: list[str] = []
        self.cleared: list[str] = []
        self.marked: set[str] = set()
        self.went_on: dict[str, bool] = {}
        self.left: list[str] = []
        self.on_let_go: Callable[[], None] = lambda: None
        self.refusals: list[Exception] = []
        self.changed = asyncio.Event()

    async def train(
        self,
        training: Training,
        *,
        device: str,
        report: Callable[[Progress], None],
        note: Callable[[Note], None],
        goes_on: Callable[[], bool],
    ) -> End:
        self.started.append(training.id)
        if self.refusals:
            raise self.refusals.pop()
        end: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self.running[training.id] = (device, end)
        self.changed.set()
        report(Progress(step=len(self.started), total_steps=10, epoch=1, loss=1.0, learning_rate=0.1))
        try:
            return await end
        finally:
            self.went_on[training.id] = goes_on()
            del self.running[training.id]
            self.changed.set()

    async def clear(self, training: Training) -> None:
        self.cleared.append(training.id)

    async def let_go(self, training: Training) -> None:
        assert training.id not in self.running
        self.on_let_go()

    async def mark_cancelled(self, training: Training) -> None:
        self.marked.add(training.id)

    async def is_marked_cancelled(self, training: Training) -> bool:
        return training.id in self.marked

    async def uncleared(self) -> Sequence[str]:
        return self.left

    def end(self, name: str, end: End) -> None:
        self.running[name][1].set_result(end)


class Registry:
    """Takes models, and has the base models that it was told to have."""

    def __init__(self) -> None:
        self.refusals: list[ArenaError] = []
        self.submitted: list[str] = []
        self.fetched: list[str] = []
        self.kept: Collection[str] | None = None
        self.base_away = asyncio.Event()

    async def submit(self, training: Training) -> str:
        self.submitted.append(training.id)
        if self.refusals:
            raise self.refusals.pop()
        return f"tasks/t/submissions/{training.id}"

    async def fetch(self, training: Training) -> None:
        await self.base_away.wait()
        self.fetched.append(training.base_model)

    async def keep(self, digests: Collection[str]) -> None:
        self.kept = digests


class World:
    """A queue over fakes, and what a test asks of it."""

    def __init__(self, *, devices: Sequence[str], runs_per_device: int) -> None:
        self.store, self.live, self.children, self.registry = Store(), LiveTrainings(), Children(), Registry()
        self.runs = Runs(
            store=self.store,  # type: ignore[arg-type]  # what the queue asks of it
            live=self.live,
            children=self.children,
            submitter=self.registry,
            bases=self.registry,
            devices=devices,
            runs_per_device=runs_per_device,
            on_model=self._on_model,
            clock=lambda: NOW,
        )

        self.trainings = Trainings(
            store=self.store,  # type: ignore[arg-type]
            live=self.live,
            queue=self.runs,
            datasets=None,  # type: ignore[arg-type]  # nothing is started through it
            tasks=None,  # type: ignore[arg-type]
            new_id=str,
            clock=lambda: NOW,
        )

    async def _on_model(self, _training: Training) -> None:
        pass

    def start(self, *trainings: Training) -> None:
        for each in trainings:
            self.store.trainings[each.id] = each
            self.live.publish(each)
        self.runs.wake()

    async def until_running(self, *names: str) -> None:
        while set(self.children.running) != set(names):
            self.children.changed.clear()
            await asyncio.wait_for(self.children.changed.wait(), 5)

    async def until_started(self, times: int) -> None:
        while len(self.children.started) < times or not self.children.running:
            self.children.changed.clear()
            await asyncio.wait_for(self.children.changed.wait(), 5)

    async def until(self, name: str, done: Callable[[Training], bool]) -> Training:
        while True:
            changed = self.live.next_change(name)
            current = self.live.get(name) or self.store.trainings[name]
            if done(current):
                return current
            await asyncio.wait_for(changed.wait(), 5)

    async def until_ended(self, name: str) -> Training:
        return await self.until(name, lambda each: each.state in ENDED)


@asynccontextmanager
async def world(
    *, devices: Sequence[str] = ("cpu",), runs_per_device: int = 1, before: Callable[[World], None] = lambda _: None
) -> AsyncIterator[World]:
    made = World(devices=devices, runs_per_device=runs_per_device)
    before(made)
    task = asyncio.ensure_future(made.runs.run())
    try:
        yield made
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not made.children.running


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fulldisk, "RETRY_S", 0.0)
    monkeypatch.setattr("services.trainer.patience.FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr("services.trainer.runs.FIRST_PAUSE_S", 0.0)


async def test_each_device_takes_its_number_of_runs_and_the_rest_wait_in_order() -> None:
    async with world(devices=("cuda:0", "cuda:1"), runs_per_device=2) as it:
        it.start(*(training(name) for name in "abcdef"))
        await it.until_running("a", "b", "c", "d")
        devices = sorted(device for device, _ in it.children.running.values())
        assert devices == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
        freed, _ = it.children.running["c"]
        it.children.end("c", Trained(b"c" * 32))
        await it.until_running("a", "b", "d", "e")
        assert it.children.running["e"][0] == freed
        assert (await it.until_ended("c")).device == freed
        it.children.end("a", Broken("it is broken"))
        await it.until_running("b", "d", "e", "f")
        assert (await it.until_ended("a")).error == "it is broken"


async def test_a_submission_keeps_no_device() -> None:
    async with world() as it:
        it.start(training("a", submit=True), training("b"))
        await it.until_running("a")
        it.children.end("a", Trained(b"a" * 32))
        await it.until_running("b")
        assert (await it.until_ended("a")).submission == "tasks/t/submissions/a"


AWAY = NotFound("DATASET_NOT_FOUND", "there is no dataset 'd' in the node's data folder")


async def test_a_training_on_its_way_waits_for_a_dataset_that_is_away() -> None:
    async with world() as it:
        it.start(training("a"))
        await it.until_running("a")
        it.children.refusals = [AWAY, AWAY]
        it.children.end("a", Died("killed by SIGBUS"))
        await it.until_started(4)
        it.children.end("a", Trained(b"a" * 32))
        done = await it.until_ended("a")
    assert done.state is TrainingState.SUCCEEDED
    assert done.warnings == ("waits: there is no dataset 'd' in the node's data folder",)


@pytest.mark.parametrize("begun", [True, False])
async def test_a_dataset_that_stays_away_is_given_up(begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.trainer.runs.DATASET_PATIENCE_S", 0.0 if begun else 600.0)
    async with world() as it:
        if not begun:
            it.children.refusals = [AWAY]
        it.start(training("a"))
        if begun:
            await it.until_running("a")
            it.children.refusals = [AWAY]
            it.children.end("a", Died("killed by SIGBUS"))
        done = await it.until_ended("a")
    assert (done.state, done.error) == (TrainingState.FAILED, AWAY.message)


async def test_a_submission_outlasts_a_clock_that_is_yet_to_be_set() -> None:
    async with world() as it:
        it.registry.refusals = [Unauthenticated("TOKEN_INVALID", "the bearer token has expired")] * 2
        it.start(training("a", submit=True))
        await it.until_running("a")
        it.children.end("a", Trained(b"a" * 32))
        done = await it.until_ended("a")
    assert (done.state, done.submission) == (TrainingState.SUCCEEDED, "tasks/t/submissions/a")
    assert done.warnings == ("tries again: the bearer token has expired",)


async def test_a_full_disk_under_the_start_of_a_process_is_said_and_outlasted() -> None:
    async with world() as it:
        it.children.refusals = [FULL, FULL, FULL]
        it.start(training("a"))
        await it.until_running("a")
        it.children.end("a", Trained(b"a" * 32))
        done = await it.until_ended("a")
    assert done.state is TrainingState.SUCCEEDED
    assert it.children.started == ["a"] * 4
    assert "paused: the disk is full" in done.warnings[0]
    assert done.warnings[1:] == ("the disk has room again: the run goes on",)


async def test_other_trouble_at_the_start_of_a_process_fails_that_training_alone() -> None:
    async with world() as it:
        it.children.refusals = [PermissionError(errno.EACCES, "no")]
        it.start(training("a"), training("b"))
        assert "internal error: PermissionError" in (await it.until_ended("a")).error
        await it.until_running("b")


@pytest.mark.parametrize("end", [Trained(b"a" * 32), Broken("no use")], ids=["trained", "broken"])
async def test_an_end_that_the_database_does_not_take_is_written_down_once_it_does(end: End) -> None:
    async with world() as it:
        it.start(training("a"), training("b"))
        await it.until_running("a")
        it.store.away = 5
        it.children.end("a", end)
        await it.until_running("b")
        done = it.store.trainings["a"]
    assert done.state is (TrainingState.SUCCEEDED if isinstance(end, Trained) else TrainingState.FAILED)
    assert "the database cannot be used" in done.warnings[0]


async def test_a_process_that_dies_again_and_again_but_gets_further_is_not_given_up() -> None:
    async with world() as it:
        it.start(training("a"))
        for deaths in range(1, 7):  # each start reports a later step
            await it.until_started(deaths)
            it.children.end("a", Died("killed"))
        await it.until_started(7)
        it.children.end("a", Trained(b"a" * 32))
        assert (await it.until_ended("a")).state is TrainingState.SUCCEEDED


async def test_what_was_asked_to_stop_between_two_steps_is_not_begun() -> None:
    async with world() as it:
        it.start(training("a", state=TrainingState.SUBMITTING, cancel_requested=True, model_digest=b"a" * 32))
        assert (await it.until_ended("a")).state is TrainingState.CANCELLED
    assert it.registry.submitted == []


FULL_DATABASE = DiskFull("the disk of the service's database is full, nothing was changed", resource="database")


async def test_a_run_is_cancelled_while_the_disk_is_full_and_what_it_held_makes_room() -> None:
    async with world() as it:
        it.start(training("a"), training("b"))
        await it.until_running("a")
        it.store.trouble, it.store.away = FULL_DATABASE, 10**9

        def make_room() -> None:
            it.store.away = 0

        it.children.on_let_go = make_room
        asked = await it.trainings.cancel("a")
        assert (asked.state, asked.cancel_requested) == (TrainingState.RUNNING, True)
        assert it.children.marked == {"a"}
        await it.until_running("b")
        assert it.store.trainings["a"].state is TrainingState.CANCELLED
        assert "a" in it.children.cleared
        # One that has ended stays as it is, also where that cannot be written again.
        it.store.away = 1
        assert (await it.trainings.cancel("a")).state is TrainingState.CANCELLED
        assert not it.children.went_on["a"]


async def test_a_cancellation_that_can_be_kept_nowhere_is_refused_and_changes_nothing() -> None:
    async with world() as it:
        it.start(training("a"))
        await it.until_running("a")
        it.store.trouble, it.store.away = FULL_DATABASE, 1

        async def full(_training: Training) -> None:
            raise FULL

        it.children.mark_cancelled = full  # type: ignore[method-assign]
        with pytest.raises(DiskFull) as refused:
            await it.trainings.cancel("a")
        assert refused.value.retry_after_s is not None
        assert "a" in it.children.running
        it.children.end("a", Trained(b"a" * 32))
        assert (await it.until_ended("a")).state is TrainingState.SUCCEEDED


async def test_a_start_on_a_full_disk_is_waited_out_and_what_was_cancelled_beside_its_run_ends() -> None:
    def found(it: World) -> None:
        for name, state in (("a", TrainingState.RUNNING), ("b", TrainingState.RUNNING), ("c", TrainingState.FAILED)):
            it.store.trainings[name] = training(name, state=state)
        it.children.marked = {"a"}
        it.children.left = ["a", "b", "c", "of nobody"]
        it.store.trouble, it.store.away = FULL_DATABASE, 3

    async with world(before=found) as it:
        await it.until_running("b")
        assert it.children.started == ["b"]
        assert (await it.until_ended("a")).state is TrainingState.CANCELLED
        # The service died before it had cleared up after c.
        assert it.children.cleared.count("c") == 1
        assert "of nobody" not in it.children.cleared


async def test_a_base_model_is_awaited_without_a_device_and_kept_while_it_is_needed() -> None:
    async with world() as it:
        it.start(training("a", base_model="b" * 64), training("b"))
        await it.until_running("b")
        it.registry.base_away.set()
        it.children.end("b", Trained(b"b" * 32))
        await it.until_running("a")
        assert it.registry.fetched == ["b" * 64]
        assert it.registry.kept == {"b" * 64}  # at the start of the service
        it.children.end("a", Trained(b"a" * 32))
        await it.until_ended("a")
        assert it.registry.kept == set()


async def test_patience_waits_as_long_as_it_is_told_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("services.trainer.patience.asyncio.sleep", sleep)
    quota = ResourceExhausted("DAILY_LIMIT", "20 submissions today", retry_after_s=700.2)
    troubles: list[Exception] = [quota, quota, Unavailable("AWAY", "the registry is away")]
    said: list[str] = []

    async def work() -> str:
        if troubles:
            raise troubles.pop(0)
        return "done"

    async def say(text: str) -> None:
        said.append(text)

    assert await persist(work, say=say) == "done"
    assert waits[:2] == [600.0, 600.0]
    assert said == ["waits 701 s: 20 submissions today", "tries again: the registry is away"]
    troubles = [ResourceExhausted("TOO_LARGE", "too large")]
    with pytest.raises(ResourceExhausted):
        await persist(work, say=say)
    troubles = [FailedPrecondition("CLOSED", "closed")]
    with pytest.raises(FailedPrecondition):
        await persist(work, say=say)


async def test_a_training_that_cannot_be_written_down_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.trainer.runs.LONGEST_PAUSE_S", 0.05)
    async with world() as it:
        it.start(training("a"), training("b"))
        await it.until_running("a")
        it.store.damaged.add("a")
        it.children.end("a", Trained(b"a" * 32))
        await it.until_running("b")
        it.store.damaged.clear()
        it.children.end("b", Trained(b"b" * 32))
        await it.until_running("a")
        it.children.end("a", Trained(b"a" * 32))
        assert (await it.until_ended("a")).state is TrainingState.SUCCEEDED
        assert it.store.trainings["b"].state is TrainingState.SUCCEEDED
