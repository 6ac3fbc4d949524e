"""Hidden datasets leave the validator's disk when their tasks have ended."""

from dataclasses import dataclass, field

from services.runtime.errors import NotFound, Unavailable
from services.validator.cache import Cache
from services.validator.leavings import Leavings, TaskDatasets

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


@dataclass
class Registry:
    """Tasks as a test sets them; an error stands for what a question ends in."""

    known: dict[str, TaskDatasets | Exception]
    asked: list[str] = field(default_factory=list)

    async def datasets(self, task):
        self.asked.append(task)
        if isinstance(found := self.known[task], Exception):
            raise found
        return found

    async def tasks(self):
        return list(self.known)


def of(*digests, ended):
    return TaskDatasets(frozenset(digests), ended)


async def filled(tmp_path, *digests):
    cache = Cache(tmp_path, max_bytes=100)

    async def fetch(path):
        path.write_bytes(b"rows")

    for digest in digests:
        async with cache.hold(digest, 4, fetch):
            pass
    return cache


def left(tmp_path):
    return {path.name for path in tmp_path.iterdir()}


async def test_a_dataset_goes_when_the_last_task_that_has_it_is_over(tmp_path):
    cache = await filled(tmp_path, A, B, C)
    (tmp_path / f"{A}.part").write_bytes(b"half")
    registry = Registry({"one": of(A, B, ended=False), "two": of(B, C, ended=True)})
    leavings = Leavings(registry, registry, cache)
    await leavings.remove()
    assert left(tmp_path) == {A, B, f"{A}.part"}
    registry.known["one"] = of(A, B, ended=True)
    await leavings.remove()
    assert left(tmp_path) == set()
    await leavings.remove()
    assert registry.asked == ["one", "two", "one"]


async def test_a_task_that_cannot_be_asked_for_keeps_what_it_had_and_nothing_else(tmp_path):
    cache = await filled(tmp_path, A, B)
    registry = Registry({"one": of(A, ended=False), "two": of(A, B, ended=False)})
    leavings = Leavings(registry, registry, cache)
    await leavings.remove()
    registry.known = {"one": Unavailable("AWAY", "away"), "two": of(A, B, ended=True)}
    await leavings.remove()
    assert left(tmp_path) == {A}
    registry.known["one"] = NotFound("TASK_NOT_FOUND", "forgotten")
    await leavings.remove()
    assert left(tmp_path) == set()


async def test_a_file_in_use_goes_the_next_time(tmp_path):
    cache = await filled(tmp_path, A)
    registry = Registry({"one": of(A, ended=True)})
    leavings = Leavings(registry, registry, cache)

    async def never(path):
        raise AssertionError

    async with cache.hold(A, 4, never) as path:
        await leavings.remove()
        assert path.exists()
    await leavings.remove()
    assert left(tmp_path) == set()


async def test_a_file_that_the_disk_does_not_let_go_keeps_no_other_and_goes_the_next_time(tmp_path):
    cache = await filled(tmp_path, A, C)
    # What stands in its name cannot be unlinked.
    (tmp_path / B).mkdir()
    registry = Registry({"one": of(B, ended=True), "two": of(A, B, C, ended=True)})
    leavings = Leavings(registry, registry, cache)
    await leavings.remove()
    assert left(tmp_path) == {B}
    (tmp_path / B).rmdir()
    (tmp_path / B).write_bytes(b"rows")
    await leavings.remove()
    assert left(tmp_path) == set()
