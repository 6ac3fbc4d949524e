"""A file that grows by what arrives: whole, hashed, and not kept in memory."""

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
    monkeypatch.setattr("tiltyard.growingfile._CACHED_BYTES", 1000)
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
