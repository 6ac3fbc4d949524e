"""The registry's process dies between any two lines, and the next one goes on to the same record log."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from services.registry.states import RoundState, SubmissionState, TaskState
from services.registry.task_states import close
from services.registry.transaction import Reading, Store, Writing
from tests.support.registry_fakes import FakeSelection, SettableClock
from tests.support.registry_world import NODES, TASK, MemoryFiles, World, model_bytes, open_database, task_config

T = TypeVar("T")


class Died(BaseException):  # not an error that anything may catch
    """The process is gone."""


class Mortality:
    """Which of the moments that a process passes is its last: before and after each write, before each question."""

    def __init__(self, dies_at: int | None) -> None:
        self.dies_at = dies_at
        self.passed = 0

    def moment(self) -> None:
        """Pass a moment, or die; the dead do not come back."""
        if self.dies_at is not None and self.passed >= self.dies_at:
            raise Died
        self.passed += 1


class MortalStore:
    """A store whose process may die before or after any write."""

    def __init__(self, store: Store, mortality: Mortality) -> None:
        self._store = store
        self._mortality = mortality

    async def write(self, work: Callable[[Writing], T], *, final: bool = True, quick: bool = False) -> T:
        self._mortality.moment()
        result = await self._store.write(work, final=final, quick=quick)
        self._mortality.moment()
        return result

    async def read(self, work: Callable[[Reading], T]) -> T:
        return await self._store.read(work)

    async def finds(self, question: Callable[[Reading], Collection[object]]) -> bool:
        return await self._store.finds(question)

    async def look_up(self, work: Callable[[Reading], T]) -> T:
        return await self._store.look_up(work)


async def story(world: World) -> None:
    """One submission with a decline, a dispute, an outlier and an unopened seal, in a task that becomes FINAL.

    Whoever calls keeps request ids and calls again after a break, as real clients do, so the story may be told from its
    beginning at any time.
    """
    content = model_bytes("a")
    number = await world.commit(NODES[0], content, request_id="commit")
    if (await world.submission(number)).state is SubmissionState.COMMITTED:
        await world.upload(NODES[0], number, content)
    await world.reveal(NODES[0], number, content, request_id="reveal")
    await world.turn()
    duties = await world.duties(number)
    await world.decline(duties[0], request_id="decline")
    await world.turn()
    duties = await world.duties(number)
    first = {duties[1]: 900, duties[2]: 500, duties[3]: 900}
    await evaluate(world, first)
    duties = await world.duties(number)
    assert len(duties) == 7
    await evaluate(world, {duties[4]: 900, duties[5]: 900, duties[6]: 900}, never_opened=duties[6])
    if (await world.round(number)).state is RoundState.OPENING:
        world.clock.now = (await world.round(number)).deadline
    await world.turn()
    await world.store.write(_close)
    while (await world.task()).state is not TaskState.FINAL:
        await world.turns.rank()


def _close(tx: Writing) -> None:
    found = tx.task(TASK)
    assert found is not None
    if found.state is TaskState.OPEN:
        close(tx, found)


async def evaluate(world: World, findings: dict[Any, int], *, never_opened: Any = None) -> None:
    for duty, found in findings.items():
        token = await world.accept(duty, request_id=f"accept {duty.participant}")
        report = await world.report(duty, found)
        await world.seal(duty, report, token=token, request_id=f"seal {duty.participant}")
    await world.turn()
    for duty, found in findings.items():
        if duty != never_opened:
            await world.open(duty, await world.report(duty, found), request_id=f"open {duty.participant}")
    await world.turn()


async def tell(folder: Path, deaths: Iterator[int | None]) -> tuple[dict[str, Any], int]:
    """The story's outcome when the process dies at `deaths` one after the other, and the moments of its last life."""
    clock = SettableClock()
    selection, database = FakeSelection(clock), open_database(folder, clock)
    try:
        await World(database, clock, selection, MemoryFiles()).open_task(validators=7, config=task_config())
        files = MemoryFiles()
        for dies_at in deaths:
            mortality = Mortality(dies_at)
            selection.before = lambda question, mortality=mortality: mortality.moment()
            world = World(database, clock, selection, files, lambda store, m=mortality: MortalStore(store, m))
            try:
                await story(world)
            except Died:
                continue
            return await outcome(world), mortality.passed
        raise AssertionError("the story was never told to its end")
    finally:
        await database.close()


async def outcome(world: World) -> dict[str, Any]:
    submission = await world.submission(1)
    assert submission.state is SubmissionState.SCORED
    evaluations = await world.store.read(lambda tx: tx.evaluations(TASK, 1, 1))
    return {
        "log": await world.store.read(lambda tx: tx.log_root()),
        "score": submission.scores[1],
        "assignments": [(a.validator, a.state, a.settled, a.refund) for a in await world.all_duties(1)],
        "verdicts": [(e.validator, e.verdict, e.disclosed) for e in evaluations],
        "settlements": dict(world.selection.settlements),
    }


@pytest.mark.parametrize(
    "stride", [pytest.param(23, id="some moments"), pytest.param(1, id="every moment", marks=pytest.mark.soak)]
)
@pytest.mark.timeout(900)
async def test_a_death_at_any_moment_changes_nothing(tmp_path: Path, stride: int) -> None:
    (tmp_path / "alive").mkdir()
    expected, moments = await tell(tmp_path / "alive", iter([None]))
    assert len(expected["score"].outliers) == 1
    assert len(expected["settlements"]) == 7
    assert moments > 50
    for moment in range(stride // 2, moments, stride):
        folder = tmp_path / str(moment)
        folder.mkdir()
        found, _ = await tell(folder, iter([moment, None]))
        assert found == expected, f"after a death at moment {moment}"


async def test_many_short_lives_tell_the_same_story(tmp_path: Path) -> None:
    (tmp_path / "alive").mkdir()
    (tmp_path / "mortal").mkdir()
    expected, _ = await tell(tmp_path / "alive", iter([None]))
    # Each life dies within three moments of new work at the latest.
    found, _ = await tell(tmp_path / "mortal", lives())
    assert found == expected


def lives() -> Iterator[int | None]:
    for life in range(200):
        yield 1 + life % 3
    yield None
