"""The cache holds what is in use, within its bytes, and trusts no file from before."""

import asyncio
import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from services.validator import cache as cache_module
from services.validator.cache import Cache, CacheTooSmall


def content(name: str, size: int = 100) -> tuple[str, bytes]:
    raw = name.encode().ljust(size, b".")
    return hashlib.sha256(raw).hexdigest(), raw


class Source:
    def __init__(self):
        self.fetched = []

    def of(self, raw):
        async def fetch(path):
            self.fetched.append(path.name)
            await asyncio.sleep(0)
            path.write_bytes(raw)

        return fetch


async def use(cache, source, name, size=100):
    digest, raw = content(name, size)
    async with cache.hold(digest, len(raw), source.of(raw)) as path:
        assert path.read_bytes() == raw
    return digest


async def test_a_file_is_fetched_once_for_all_who_want_it(tmp_path):
    cache, source = Cache(tmp_path, max_bytes=1000), Source()
    await asyncio.gather(*(use(cache, source, "a") for _ in range(5)))
    await use(cache, source, "a")
    assert len(source.fetched) == 1


async def test_the_least_recently_used_goes_first(tmp_path):
    cache, source = Cache(tmp_path, max_bytes=300), Source()
    a, b, c = [await use(cache, source, name) for name in "abc"]
    for age, digest in enumerate((b, c, a)):
        os.utime(tmp_path / digest, (age, age))
    d = await use(cache, source, "d")
    assert {path.name for path in tmp_path.iterdir()} == {a, c, d}


async def test_a_file_in_use_stays_and_what_does_not_fit_beside_it_is_refused(tmp_path):
    cache, source = Cache(tmp_path, max_bytes=250), Source()
    digest, raw = content("a", 200)
    async with cache.hold(digest, 200, source.of(raw)) as path:
        with pytest.raises(CacheTooSmall, match="300 bytes are needed"):
            await use(cache, source, "b")
        assert path.exists()
    await use(cache, source, "b")
    assert not path.exists()


async def test_a_disk_smaller_than_the_cache_may_be_holds_the_latest_that_fit(tmp_path, monkeypatch):
    disk_bytes = 450

    def free(folder):
        return disk_bytes - sum(path.stat().st_size for path in folder.iterdir())

    monkeypatch.setattr(cache_module, "SPARED_BYTES", 50)
    cache, source = Cache(tmp_path, max_bytes=10_000, free=free), Source()
    for age, name in enumerate("abcdefg"):
        os.utime(tmp_path / await use(cache, source, name), (age, age))
    assert {path.name for path in tmp_path.iterdir()} == {content(name)[0] for name in "defg"}
    with pytest.raises(CacheTooSmall, match="451 bytes are yet to come, the disk has room for 450"):
        await use(cache, source, "too large", 451)
    assert len(list(tmp_path.iterdir())) == 4
    # What a broken fetch has brought already does not need room again.
    digest, raw = content("half", 450)
    (tmp_path / f"{digest}.part").write_bytes(raw[:20])
    fetch = source.of(raw)

    async def go_on(path):
        path.with_name(f"{digest}.part").unlink()
        await fetch(path)

    async with cache.hold(digest, len(raw), go_on) as path:
        assert list(tmp_path.iterdir()) == [path]


async def test_bytes_that_a_crash_spoiled_are_fetched_again(tmp_path):
    source = Source()
    digest = await use(Cache(tmp_path, max_bytes=1000), source, "a")
    (tmp_path / digest).write_bytes(b"spoiled")
    await use(Cache(tmp_path, max_bytes=1000), source, "a")
    assert len(source.fetched) == 2
    await use(Cache(tmp_path, max_bytes=1000), source, "a")
    assert len(source.fetched) == 2


async def test_a_folder_that_somebody_empties_is_filled_again(tmp_path):
    cache, source = Cache(tmp_path / "cache", max_bytes=1000), Source()
    digest = await use(cache, source, "a")
    (tmp_path / "cache" / digest).unlink()
    await use(cache, source, "a")
    shutil.rmtree(tmp_path / "cache")
    await use(cache, source, "a")
    assert len(source.fetched) == 3


async def test_a_half_fetched_file_counts_and_can_go(tmp_path):
    digest, _ = content("old", 90)
    (tmp_path / f"{digest}.part").write_bytes(bytes(90))
    cache, source = Cache(tmp_path, max_bytes=150), Source()
    await use(cache, source, "a")
    assert len(list(tmp_path.iterdir())) == 1


async def test_a_fetch_that_fails_leaves_the_cache_usable(tmp_path):
    cache, source = Cache(tmp_path, max_bytes=150), Source()
    digest, raw = content("a")

    async def fail(path):
        raise OSError(28, "no space left")

    with pytest.raises(OSError, match="no space"):
        async with cache.hold(digest, len(raw), fail):
            raise AssertionError("the block must not run")
    await use(cache, source, "a")


async def test_what_is_no_file_of_ours_is_passed_over(tmp_path):
    (tmp_path / "lost+found").mkdir()
    os.utime(tmp_path / "lost+found", (0, 0))
    cache, source = Cache(tmp_path, max_bytes=150), Source()
    await use(cache, source, "a")
    digest = await use(cache, source, "b")
    assert {path.name for path in tmp_path.iterdir()} == {"lost+found", digest}


async def test_a_file_that_cannot_be_removed_keeps_its_room_and_no_other_file(tmp_path, monkeypatch):
    cache, source = Cache(tmp_path, max_bytes=250), Source()
    stuck = await use(cache, source, "stuck")
    os.utime(tmp_path / stuck, (0, 0))
    await use(cache, source, "a")
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path.name == stuck:
            raise PermissionError(errno.EPERM, "immutable")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    digest = await use(cache, source, "b")
    assert {path.name for path in tmp_path.iterdir()} == {stuck, digest}
    with pytest.raises(CacheTooSmall, match="200 bytes are needed at once, and 100 that are not needed"):
        await use(cache, source, "c", 200)
