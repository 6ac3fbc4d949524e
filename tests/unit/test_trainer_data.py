"""What is found in a dataset before the first step, and a disk that is full for a while."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from services.runtime.errors import DiskFull, InvalidArgument
from services.trainer import runfolder
from services.trainer.config import LossKind, TrainingConfig
from services.trainer.datareport import DataReport, report_on
from services.trainer.descent.preparing import packed as packed_before
from services.trainer.fulldisk import write_when_there_is_room
from services.trainer.localdata import DataFolder, LocalFile, examine
from tiltyard.datasets import Dataset, DatasetError, pack
from tiltyard.modelspec import Linear, ModelSpec


def dataset(folder: Path, x: np.ndarray, y: np.ndarray) -> Dataset:
    save_file({"x": x, "y": y}, folder / "d.safetensors")
    return Dataset.open(folder / "d.safetensors")


def test_a_report_counts_classes_duplicates_and_contradictions(tmp_path: Path) -> None:
    x = np.array([[1, 2], [3, 4], [1, 2], [1, 2], [200, 0]], np.uint8)
    report = report_on(dataset(tmp_path, x, np.array([0, 1, 0, 1, 3])), classes=5, scratch=tmp_path)
    assert report == DataReport(
        rows=5,
        class_rows=(2, 2, 0, 1, 0),
        minimum=0,
        maximum=200,
        mean=float(x.mean()),
        not_finite_rows=0,
        duplicate_rows=2,
        contradicting_rows=1,
    )
    assert DataReport.from_json(report.to_json()) == report
    assert [text.split()[0] for text in report.warnings()] == ["2", "1", "2"]


@pytest.mark.parametrize("looked_at", [1, 1000])
def test_a_report_of_floats_leaves_out_what_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: int
) -> None:
    monkeypatch.setattr("services.trainer.datareport._LOOKED_AT", looked_at)
    x = np.array([[1.0, np.nan], [-3.0, 0.5], [np.inf, 7.0]], np.float32)
    report = report_on(dataset(tmp_path, x, np.zeros((3, 2), np.float32)), classes=None, scratch=tmp_path)
    assert (report.minimum, report.maximum, report.not_finite_rows, report.class_rows) == (-3.0, 7.0, 2, ())
    assert report.mean == pytest.approx((1 - 3 + 0.5 + 7) / 4)
    assert report.duplicate_rows == 0


def test_rows_in_different_chunks_are_compared(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (5000, 4096), np.uint8)
    x[4999] = x[3]
    report = report_on(dataset(tmp_path, x, np.arange(5000) % 2), classes=2, scratch=tmp_path)
    assert (report.duplicate_rows, report.contradicting_rows) == (1, 0)


@pytest.mark.parametrize(("part_rows", "piece_rows", "hashed_bytes"), [(10, 7, 1024), (100, 1000, 1), (5000, 64, 3)])
def test_rows_are_compared_in_parts_and_pieces_as_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_rows: int, piece_rows: int, hashed_bytes: int
) -> None:
    monkeypatch.setattr("services.trainer.datareport._HASHED_BYTES", hashed_bytes)
    monkeypatch.setattr("services.trainer.datareport._PART_ROWS", part_rows)
    monkeypatch.setattr("services.trainer.datareport._PIECE_ROWS", piece_rows)
    monkeypatch.setattr("tiltyard.datasets.CHUNK_BYTES", 128)
    random = np.random.default_rng(1)
    x, labels = random.integers(0, 5, (900, 4), np.uint8), random.integers(0, 3, 900)
    x[500:700] = x[3]  # more of one kind than a part has room for
    for y in (labels, np.stack([labels, -0.0 * labels], axis=1).astype(np.float32)):
        seen: dict[bytes, np.ndarray] = {}
        expected = [0, 0]
        for row, label in zip(x, y, strict=True):
            first = seen.get(row.tobytes())
            if first is None:
                seen[row.tobytes()] = label
            else:
                expected[0] += 1
                expected[1] += bool(np.any(label != first))
        found = report_on(dataset(tmp_path, x, y), classes=3 if y is labels else None, scratch=tmp_path)
        assert [found.duplicate_rows, found.contradicting_rows] == expected
        assert found.class_rows == (tuple(np.bincount(labels).tolist()) if y is labels else ())
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_of_a_large_dataset_a_caller_waits_for_the_header_alone(tmp_path: Path) -> None:
    x = np.full((4, 2), np.nan, np.float32)
    dataset(tmp_path, x, np.array([0, 1, 0, 1]))
    path, spec = tmp_path / "d.safetensors", ModelSpec((2,), 2, Linear())
    assert examine(path, spec, LossKind.CROSS_ENTROPY, whole=False) == 4
    with pytest.raises(InvalidArgument, match="NaN"):
        examine(path, spec, LossKind.CROSS_ENTROPY)
    with pytest.raises(InvalidArgument, match="shape"):
        examine(path, ModelSpec((3,), 2, Linear()), LossKind.CROSS_ENTROPY, whole=False)


class Disk:
    """Has no room until it was waited for `waits` times."""

    def __init__(self, waits: int, code: int = errno.ENOSPC) -> None:
        self.waits, self.code, self.written = waits, code, 0

    def write(self) -> None:
        if self.waits:
            raise OSError(self.code, "No space left on device")
        self.written += 1

    def wait(self, seconds: float) -> bool:
        assert seconds > 0
        self.waits -= 1
        return False


def test_a_full_disk_pauses_says_so_and_goes_on() -> None:
    disk, said = Disk(3), list[str]()
    assert write_when_there_is_room(disk.write, warn=said.append, wait=disk.wait)
    assert disk.written == 1
    assert len(said) == 2
    assert "paused: the disk is full" in said[0]
    assert "goes on" in said[1]


def test_a_paused_run_that_is_told_to_stop_stops() -> None:
    disk = Disk(3)
    assert not write_when_there_is_room(disk.write, warn=lambda _: None, wait=lambda _: True)
    assert disk.written == 0


def test_other_trouble_with_a_disk_is_not_waited_for() -> None:
    disk = Disk(3, errno.EIO)
    with pytest.raises(OSError, match="No space"):
        write_when_there_is_room(disk.write, warn=lambda _: None, wait=disk.wait)


def copies(folder: Path) -> set[str]:
    """What lies in the folder of packed copies, by path."""
    found = (path.relative_to(folder / ".packed") for path in (folder / ".packed").rglob("*") if path.is_file())
    return {str(path) for path in found if path.name != ".lock"}


def packed(folder: DataFolder, name: str) -> LocalFile:
    """A dataset of another kind than safetensors, once it has been used."""
    found = folder.locate(name, LossKind.CROSS_ENTROPY)
    assert found.source is not None
    with folder.copies.held(found.path, found.source, LossKind.CROSS_ENTROPY):
        assert found.path.exists()
    return found


def write_csv(path: Path, *, rows: int = 200) -> Path:
    path.write_text("a,b,y\n" + "1,2,cat\n3,4,dog\n" * (rows // 2))
    return path


async def test_other_kinds_of_data_are_packed_once_and_again_when_they_change(tmp_path: Path) -> None:
    folder, spec = DataFolder(tmp_path), ModelSpec((2,), 2, Linear())
    source = tmp_path / "d.csv"
    source.write_text("a,b,y\n1,2,cat\n3,4,dog\n5,6,cat\n")
    found = await folder.check("d.csv", spec=spec, loss=LossKind.CROSS_ENTROPY)
    assert found.rows == 3
    located = packed(folder, "d.csv")
    assert located.mark == found.mark
    assert Dataset.open(located.path).labels == ("cat", "dog")
    inode = located.path.stat().st_ino
    assert (await folder.check("d.csv", spec=spec, loss=LossKind.CROSS_ENTROPY)).mark == found.mark
    assert located.path.stat().st_ino == inode
    source.write_text("a,b,y\n1,2,cat\n3,4,dog\n")
    changed = packed(folder, "d.csv")
    assert changed.mark != found.mark
    assert len(Dataset.open(changed.path)) == 2
    folder.tidy()
    # What the source was before is of no use to anybody.
    assert len(copies(tmp_path)) == 1


def test_packed_copies_are_bounded_and_made_again_with_the_same_mark(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = ["a.csv", "sub/b.csv", "c.csv"]
    for name in names:
        (tmp_path / name).write_text("a,b,y\n" + "1,2,cat\n3,4,dog\n" * 100)
    unbounded = DataFolder(tmp_path)
    first = {name: packed(unbounded, name) for name in names}
    size = first["a.csv"].path.stat().st_size
    for age, name in enumerate(["sub/b.csv", "a.csv", "c.csv"]):
        os.utime(first[name].path, (age, age))
    (tmp_path / "d.csv").write_text("a,b,y\n" + "1,2,cat\n3,4,dog\n" * 100)
    bounded = DataFolder(tmp_path, packed_bytes=2 * size)
    packed(bounded, "a.csv")  # used again, so c.csv is the next to go
    packed(bounded, "d.csv")
    assert {path.split("/")[0] for path in copies(tmp_path)} == {"a.csv", "d.csv"}
    again = packed(bounded, "sub/b.csv")
    assert again == first["sub/b.csv"]
    assert again.path.stat().st_size == size
    assert len(copies(tmp_path)) == 2


def test_what_a_crash_or_a_deleted_source_leaves_is_removed(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("a,b,y\n1,2,cat\n3,4,dog\n")
    folder = DataFolder(tmp_path)
    kept, gone = (packed(folder, name).path for name in ("a.csv", "b.csv"))
    (kept.parent / f".{kept.name}.x1y2z3").write_bytes(b"half a copy")
    (tmp_path / ".packed" / f"{'0' * 32}.safetensors").write_bytes(b"of an older layout")
    (tmp_path / "b.csv").unlink()
    DataFolder(tmp_path).tidy()
    assert copies(tmp_path) == {str(kept.relative_to(tmp_path / ".packed"))}
    assert not gone.parent.exists()


def test_a_copy_in_use_stays_though_it_is_over_the_bound(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv")
    folder = DataFolder(tmp_path, packed_bytes=0)
    found = folder.locate("a.csv", LossKind.CROSS_ENTROPY)
    with folder.copies.held(found.path, source, LossKind.CROSS_ENTROPY):
        assert folder.copies.bound() == 0
        source.unlink()  # of use to nobody but who has it
        folder.tidy()
        assert found.path.exists()
    assert folder.copies.bound() > 0
    assert copies(tmp_path) == set()


def test_a_source_that_two_ask_for_is_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "a.csv")
    times: list[Path] = []

    def counted(source: Path, out: Path, **options: Any) -> None:
        times.append(out)
        pack(source, out, **options)

    monkeypatch.setattr("services.trainer.packed.pack", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: packed(DataFolder(tmp_path), "a.csv"), range(8)))
    assert len(set(found)) == 1
    assert times == [found[0].path]


def test_what_changes_while_it_is_packed_is_no_copy_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_csv(tmp_path / "a.csv")

    def changing(source: Path, out: Path, **options: Any) -> None:
        pack(source, out, **options)
        write_csv(source, rows=100)

    monkeypatch.setattr("services.trainer.packed.pack", changing)
    with pytest.raises(DatasetError, match="changed while it was packed"):
        packed(DataFolder(tmp_path), source.name)
    assert copies(tmp_path) == set()


async def test_of_a_large_source_a_caller_waits_for_its_kind_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_csv(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_text("1,2,cat")
    monkeypatch.setattr("services.trainer.localdata.LARGE_SOURCE_BYTES", 4)
    folder, spec = DataFolder(tmp_path), ModelSpec((9,), 2, Linear())
    assert (await folder.check("a.csv", spec=spec, loss=LossKind.CROSS_ENTROPY)).rows is None
    assert not (tmp_path / ".packed").exists()
    with pytest.raises(InvalidArgument, match=r"a\.txt: must be \.npz, \.csv"):
        await folder.check("a.txt", spec=spec, loss=LossKind.CROSS_ENTROPY)
    # What somebody else had it packed into is looked through.
    packed(folder, "a.csv")
    with pytest.raises(InvalidArgument, match="shape"):
        await folder.check("a.csv", spec=spec, loss=LossKind.CROSS_ENTROPY)


def test_a_full_disk_makes_room_of_copies_that_nobody_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = DataFolder(tmp_path)
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path / name)
    packed(folder, "a.csv")

    def full_beside_another(source: Path, out: Path, **options: Any) -> None:
        if copies(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        pack(source, out, **options)

    monkeypatch.setattr("services.trainer.packed.pack", full_beside_another)
    packed(folder, "b.csv")
    assert {path.split("/")[0] for path in copies(tmp_path)} == {"b.csv"}


def test_packing_on_a_full_disk_is_not_begun_again_before_there_is_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_csv(tmp_path / "a.csv")
    found = DataFolder(tmp_path).locate("a.csv", LossKind.CROSS_ENTROPY)
    order = runfolder.Order(
        dataset=found.path,
        spec=ModelSpec((2,), 2, Linear()),
        loss=LossKind.CROSS_ENTROPY,
        config=TrainingConfig(),
        device="cpu",
        threads=1,
        source=source,
        data=tmp_path,
    )
    free = iter([1000, 1000, 1001, 2000])
    monkeypatch.setattr("services.trainer.fulldisk.shutil.disk_usage", lambda _: SimpleNamespace(free=next(free)))
    attempts: list[bool] = []

    def full_at_first(source: Path, out: Path, **options: Any) -> None:
        attempts.append(True)
        if len(attempts) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        pack(source, out, **options)

    monkeypatch.setattr("services.trainer.packed.pack", full_at_first)
    events: list[dict[str, Any]] = []
    with ExitStack() as using:
        assert packed_before(order, events.append, using.enter_context, lambda _: False)
        assert found.path.exists()
    assert len(attempts) == 2
    assert list(free) == []
    assert [event["event"] for event in events] == ["warning", "preparing", "warning"]
    assert (events[1]["stage"], events[1]["total_rows"]) == ("packing", 0)


async def test_a_packed_copy_is_no_dataset_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b,y\n1,2,cat\n3,4,dog\n")
    folder = DataFolder(tmp_path)
    copy = packed(folder, "a.csv").path
    with pytest.raises(InvalidArgument, match="relative path"):
        folder.locate(str(copy.relative_to(tmp_path)), LossKind.CROSS_ENTROPY)


async def test_a_disk_that_is_too_full_to_pack_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("a,b,y\n1,2,cat\n3,4,dog\n")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("services.trainer.packed.pack", full)
    with pytest.raises(DiskFull, match="disk is full"):
        await DataFolder(tmp_path).check("a.csv", spec=ModelSpec((2,), 2, Linear()), loss=LossKind.CROSS_ENTROPY)


async def test_a_folder_of_images_is_a_dataset(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        image.new("L", (3, 2), 7).save(tmp_path / "pets" / label / "one.png")
    spec = ModelSpec((2, 3), 2, Linear())
    assert (await DataFolder(tmp_path).check("pets", spec=spec, loss=LossKind.CROSS_ENTROPY)).rows == 2
