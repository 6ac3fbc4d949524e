"""What both places for artifacts do, a directory and a bucket: keep uploads through any death, and files whole."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest

from services.registry.artifacts import bucket
from services.registry.artifacts.bucket import BucketFiles
from services.registry.artifacts.directory import DirectoryFiles, PartialFile
from services.registry.artifacts.files import ArtifactFiles, stand_in
from services.registry.artifacts.storage import open_artifacts
from tests.support.s3_server import S3Server

ADA, BOB = "a" * 40, "b" * 40
CONTENT = b"some bytes of a model" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()

Open = Callable[[], ArtifactFiles]


class Died(BaseException):
    """The process ends here."""


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The setting that names an empty place."""
    if request.param == "directory":
        return str(tmp_path / "place")
    server: S3Server = request.getfixturevalue("s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.bucket()


@pytest.fixture
def process(place: str, tmp_path: Path) -> Open:
    """Opens the place as the next process does."""
    return lambda: open_artifacts(place, state_dir=tmp_path / "state")


def hand_in(files: ArtifactFiles, content: bytes, owner: str = ADA) -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    partial = files.open_partial(owner, sha256, anew=True)
    partial.append([content])
    assert partial.finish()
    partial.settle()
    return sha256


def content_of(files: ArtifactFiles, sha256: str) -> bytes:
    with contextlib.closing(files.open(sha256)) as file:
        return file.read(0, file.size + 1)


def test_uploads_leave_room_on_their_disk_for_what_is_written_beside_them(
    process: Open, place: str, tmp_path: Path
) -> None:
    files = open_artifacts(place, state_dir=tmp_path / "state", keep_free_bytes=shutil.disk_usage(tmp_path).total)
    partials = (files.open_partial(ADA, SHA256, anew=True), files.open_unnamed(ADA, stand_in()))
    for partial in partials:
        with pytest.raises(OSError, match="No space left"):
            partial.append([CONTENT])
        assert partial.size == 0
        partial.close()
    # Others' bytes may go meanwhile: what is there is gone on with.
    hand_in(process(), CONTENT)


def test_an_upload_goes_on_in_the_next_process(process: Open) -> None:
    killed = process().open_partial(ADA, SHA256, anew=True)
    killed.append([CONTENT[:100], CONTENT[100:150]])
    # Nothing of it was closed.
    files = process()
    assert (files.partial_size(ADA, SHA256), files.partial_size(BOB, SHA256)) == (150, 0)
    with pytest.raises(FileNotFoundError):
        files.open(SHA256)
    partial = files.open_partial(ADA, SHA256, anew=False)
    partial.append([CONTENT[150:]])
    assert partial.finish()
    partial.settle()
    assert content_of(process(), SHA256) == CONTENT
    assert (files.partial_size(ADA, SHA256), files.open_uploads()) == (0, [])
    killed.close()


def test_bytes_of_another_digest_leave_nothing(process: Open) -> None:
    files = process()
    partial = files.open_partial(ADA, SHA256, anew=True)
    partial.append([CONTENT[:-1], b"?"])
    assert not partial.finish()
    partial.close()
    assert files.open_uploads() == []
    with pytest.raises(FileNotFoundError):
        files.open(SHA256)


@pytest.mark.parametrize("moment", ["before it is placed", "when it is placed", "before it is on record"])
def test_no_byte_is_sent_twice_wherever_the_process_dies(
    process: Open, place: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = process().open_partial(ADA, SHA256, anew=True)
    partial.append([CONTENT])
    with monkeypatch.context() as patch:
        if moment == "before it is placed":
            patch.setattr(partial, "_place", _die)
        elif moment == "when it is placed":
            _die_after_placing(patch, to_bucket=place.startswith("s3:"))
        with contextlib.suppress(Died):
            assert partial.finish()
            assert moment == "before it is on record"
    files = process()
    assert files.partial_size(ADA, SHA256) == len(CONTENT)
    assert [(each.owner, each.sha256, each.size_bytes) for each in files.open_uploads()] == [
        (ADA, SHA256, len(CONTENT))
    ]
    # Whoever has sent nothing gains nothing by it.
    assert files.partial_size(BOB, SHA256) == 0
    partial = files.open_partial(ADA, SHA256, anew=False)
    assert partial.size == len(CONTENT)
    partial.append([])
    assert partial.finish()
    partial.settle()
    assert files.open_uploads() == []
    assert content_of(files, SHA256) == CONTENT


def _die(*_: object, **__: object) -> None:
    raise Died


def _die_after_placing(patch: pytest.MonkeyPatch, *, to_bucket: bool) -> None:
    def wrapped(work: Callable[..., Any]) -> Callable[..., Any]:
        def die_afterwards(*arguments: Any, **named: Any) -> None:
            work(*arguments, **named)
            raise Died

        return die_afterwards

    if to_bucket:
        patch.setattr(bucket.obstore, "put", wrapped(obstore.put))
    else:
        patch.setattr(Path, "replace", wrapped(Path.replace))


def test_an_upload_begun_anew_forgets_what_there_was(process: Open) -> None:
    files = process()
    partial = files.open_partial(ADA, SHA256, anew=True)
    partial.append([b"other bytes"])
    partial.close()
    partial = files.open_partial(ADA, SHA256, anew=True)
    assert partial.size == 0
    partial.append([CONTENT])
    assert partial.finish()
    # Placed and not on record; its owner sends all of it once more.
    partial = files.open_partial(ADA, SHA256, anew=True)
    assert isinstance(partial, PartialFile)
    assert partial.size == 0
    partial.close()
    assert content_of(files, SHA256) == CONTENT


def test_an_upload_without_a_name_is_like_any_other_from_its_name_on(process: Open) -> None:
    earlier = process().open_partial(ADA, SHA256, anew=True)
    earlier.append([CONTENT[:20]])
    killed = process().open_unnamed(ADA, stand_in())
    killed.append([CONTENT[:100]])
    assert process().partial_size(ADA, SHA256) == 20
    killed.name(SHA256)
    killed.append([CONTENT[100:150]])
    # Nothing of it was closed.
    files = process()
    assert [(each.sha256, each.size_bytes, each.is_named) for each in files.open_uploads()] == [(SHA256, 150, True)]
    partial = files.open_partial(ADA, SHA256, anew=False)
    partial.append([CONTENT[150:]])
    assert partial.finish()
    partial.settle()
    assert (content_of(files, SHA256), files.open_uploads()) == (CONTENT, [])
    killed.close()
    earlier.close()


def test_an_upload_that_gets_no_name_leaves_nothing_unless_the_process_dies(process: Open) -> None:
    files = process()
    for content in ([], [CONTENT]):
        partial = files.open_unnamed(ADA, stand_in())
        partial.append(content)
        partial.close()
        assert files.open_uploads() == []
    killed = files.open_unnamed(ADA, stand_in())
    killed.append([CONTENT])
    files = process()
    (found,) = files.open_uploads()
    assert (found.owner, found.size_bytes, found.is_named) == (ADA, len(CONTENT), False)
    files.remove_partial(ADA, found.sha256)
    assert files.open_uploads() == []
    killed.close()


def test_an_upload_that_gets_the_name_of_one_that_is_placed_is_placed_again(process: Open) -> None:
    files = process()
    placed = files.open_partial(ADA, SHA256, anew=True)
    placed.append([CONTENT])
    assert placed.finish()
    partial = files.open_unnamed(ADA, stand_in())
    partial.append([CONTENT])
    partial.name(SHA256)
    assert [each.size_bytes for each in files.open_uploads()] == [len(CONTENT)]
    assert partial.finish()
    partial.settle()
    assert (content_of(files, SHA256), files.open_uploads()) == (CONTENT, [])


def test_a_large_upload_goes_on_past_the_page_cache_under_its_name(
    process: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltyard.growingfile.KEPT_BYTES", 0)
    content = os.urandom(3 << 20)
    files = process()
    for named_after in (0, 1 << 20):
        partial = files.open_unnamed(ADA, stand_in())
        partial.append([content[:named_after]])
        partial.name(hashlib.sha256(content).hexdigest())
        partial.append([content[named_after:]])
        assert partial.finish()
        partial.settle()
        assert content_of(files, hashlib.sha256(content).hexdigest()) == content


def test_files_are_read_from_any_offset(process: Open) -> None:
    files = process()
    content = os.urandom(9 << 20)
    sha256 = hand_in(files, content)
    with contextlib.closing(files.open(sha256)) as file:
        assert file.size == len(content)
        for offset, length in (
            (0, 10),
            (5, 1 << 20),
            (8 << 20, 2 << 20),
            (3, 9 << 20),
            (len(content), 5),
            (1 << 40, 5),
        ):
            assert file.read(offset, length) == content[offset : offset + length]
    with files.local(sha256) as path:
        assert path.read_bytes() == content
    with pytest.raises(FileNotFoundError):
        files.open("0" * 64)


def test_what_is_there_is_listed_by_its_first_digits_and_removed(process: Open) -> None:
    files = process()
    digests = sorted(hand_in(files, bytes([number])) for number in range(5))
    for sha256 in digests:
        found = files.stored(sha256[:2])
        assert sha256 in [each.sha256 for each in found]
        assert all(each.sha256[:2] == sha256[:2] for each in found)
        assert all(abs(each.change_time - datetime.now(UTC)) < timedelta(minutes=5) for each in found)
    for _ in range(2):
        files.remove(digests[0])
    assert digests[0] not in [each.sha256 for each in files.stored(digests[0][:2])]
    with pytest.raises(FileNotFoundError):
        files.open(digests[0])
    assert content_of(files, digests[1])


def test_open_uploads_are_those_of_one_owner_or_of_all(process: Open) -> None:
    files = process()
    for owner, content in ((ADA, b"one"), (ADA, b"two"), (BOB, b"one")):
        partial = files.open_partial(owner, hashlib.sha256(content).hexdigest(), anew=True)
        partial.append([content[:2]])
        partial.close()
    assert len(files.open_uploads()) == 3
    assert {(each.owner, each.size_bytes) for each in files.open_uploads(ADA)} == {(ADA, 2)}
    for _ in range(2):
        files.remove_partial(BOB, hashlib.sha256(b"one").hexdigest())
    assert files.open_uploads(BOB) == []
    assert len(files.open_uploads()) == 2


def test_a_bucket_that_does_not_answer_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    files = BucketFiles("s3://nowhere", tmp_path)
    with pytest.raises(OSError, match="S3") as raised:
        files.open(SHA256)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("place", ["gs://bucket", "s3://", "s3://bucket?x=1", "https://bucket"])
def test_another_place_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s3://BUCKET/PREFIX"):
        open_artifacts(place, state_dir=tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
def test_a_large_file_is_let_go_of_while_one_reads_it_and_kept_while_several_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _descriptor, _offset, length, _advice: let_go.append(length))
    monkeypatch.setattr("tiltyard.pagecache.KEPT_BYTES", 100)
    files = DirectoryFiles(tmp_path)
    content = os.urandom(400)
    sha256 = hand_in(files, content)
    let_go.clear()
    with contextlib.closing(files.open(sha256)) as first:
        assert first.read(0, 150) + first.read(150, 50) == content[:200]
        assert let_go == [150]
        with contextlib.closing(files.open(sha256)) as second:
            assert second.read(0, 400) == content
            assert first.read(300, 50) == content[300:350]
            assert let_go == [150]
        assert first.read(350, 50) == content[350:]
        assert let_go == [150, 350]
