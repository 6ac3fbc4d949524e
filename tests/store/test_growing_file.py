"""A file that grows by what arrives: whole, hashed, and not kept in memory; and others that pass through it."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from tiltyard.growingfile import GrowingFile


def test_what_is_there_already_is_hashed_before_the_rest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"begun ")
    file = GrowingFile(tmp_path / "file")
    assert file.size == 6
    file.append([b"and", b" ended"])
    assert (file.size, file.digest()) == (15, hashlib.sha256(b"begun and ended").digest())
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == b"begun and ended"


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
def test_a_large_file_is_let_go_of_as_it_grows_and_a_small_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[tuple[int, int, int]] = []
    advise = os.posix_fadvise

    def noted(descriptor: int, offset: int, length: int, advice: int) -> None:
        advised.append((offset, length, advice))
        advise(descriptor, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    monkeypatch.setattr("tiltyard.pagecache.KEPT_BYTES", 1000)
    content = os.urandom(3000)
    small = GrowingFile(tmp_path / "small")
    small.append([content[:999]])
    small.close()
    assert advised == []
    large = GrowingFile(tmp_path / "large")
    for start in range(0, 3000, 300):
        large.append([content[start : start + 300]])
    assert advised == [(0, length, os.POSIX_FADV_DONTNEED) for length in (1200, 2400)]
    assert large.digest() == hashlib.sha256(content).digest()
    large.close()
    assert (tmp_path / "large").read_bytes() == content


def test_whole_blocks_of_a_large_file_go_past_the_page_cache_and_the_rest_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltyard.growingfile.KEPT_BYTES", 8192)
    content = os.urandom(8192 + 3 * 4096 + 100 + 5000 + 3 * (1 << 20))
    file = GrowingFile(tmp_path / "file")
    # Small; whole blocks; a part of one; off the blocks' bounds from here on; more than a piece, from off the bounds.
    for start, end in ((0, 8192), (8192, 20480), (20480, 20580), (20580, 25580), (25580, len(content))):
        file.append([content[start:end]])
        assert (tmp_path / "file").read_bytes() == content[:end]
    assert (file.size, file.digest()) == (len(content), hashlib.sha256(content).digest())
    file.close()
    begun = GrowingFile(tmp_path / "file")
    begun.append([memoryview(content)])
    begun.sync()
    assert begun.digest() == hashlib.sha256(2 * content).digest()
    begun.close()
    assert (tmp_path / "file").read_bytes() == 2 * content


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no way past the page cache")
def test_a_file_system_that_takes_nothing_past_its_cache_is_written_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltyard.growingfile.KEPT_BYTES", 0)
    content = os.urandom(3 << 20)

    def refuses(*_arguments: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    for name in ("open", "pwrite"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, refuses)
            file = GrowingFile(tmp_path / name)
            file.append([content])
        assert file.digest() == hashlib.sha256(content).digest()
        file.close()
        assert (tmp_path / name).read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no way past the page cache")
def test_what_was_written_before_the_disk_was_full_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltyard.growingfile.KEPT_BYTES", 0)
    content = os.urandom(4 << 20)
    write = os.pwrite

    def full(descriptor: int, data: memoryview, at: int) -> int:
        if at >= 2 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, at)

    file = GrowingFile(tmp_path / "file")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            file.append([content])
    assert (file.size, file.digest()) == (2 << 20, hashlib.sha256(content[: 2 << 20]).digest())
    file.append([content[2 << 20 :]])
    assert file.digest() == hashlib.sha256(content).digest()
    file.close()
    assert (tmp_path / "file").read_bytes() == content
