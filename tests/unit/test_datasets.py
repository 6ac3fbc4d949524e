"""Datasets: what is written is what is opened, what is wrong is named, and the sources that people have are packed."""

import io
import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tiltyard import datasets
from tiltyard.datasets import Dataset, DatasetError, Packed, pack, scan, smallest, write_dataset

X = np.arange(24, dtype=np.int64).reshape(6, 2, 2)
Y = np.array([0, 1, 2, 0, 1, 2])


def _fields(dataset: Dataset, shape: tuple[int, ...] = (2, 2), classes: int | None = 3) -> list[str]:
    return [violation.field for violation in scan(dataset, shape, classes)]


def _written(path: Path, x: object, y: object) -> Dataset:
    """A file as a stranger might make it, past the checks of write_dataset."""
    save_file({"x": np.asarray(x), "y": np.asarray(y)}, path)
    return Dataset.open(path)


def test_a_dataset_comes_back_small_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "d"
    write_dataset(path, X, Y, labels=["a", "b", "c"])
    first = path.read_bytes()
    dataset = Dataset.open(path)
    assert (dataset.x.dtype, dataset.y.dtype, dataset.datatype, len(dataset)) == (np.uint8, np.int64, "UINT8", 6)
    assert np.array_equal(dataset.x, X)
    assert np.array_equal(dataset.y, Y)
    assert dataset.labels == ("a", "b", "c")
    assert dataset.row_bytes(2, 4) == X[2:4].astype(np.uint8).tobytes()
    assert dataset.row_bytes(5, 99) == X[5:].astype(np.uint8).tobytes()
    assert np.array_equal(load_file(path)["x"], X)
    assert scan(dataset, (2, 2), 3) == []
    with pytest.raises(ValueError, match="read-only"):
        dataset.x[0, 0, 0] = 1
    write_dataset(path, X, Y, labels=["a", "b", "c"])
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([0.0, 16.0]), "u1"),
        (np.array([-1, 127]), "i1"),
        (np.array([0, 65535]), "u2"),
        (np.array([-1, 300]), "i2"),
        (np.array([0, 70_000]), "i4"),
        (np.array([0, 1 << 40]), "i8"),
        (np.array([0.5, 1.0]), "f4"),
        (np.array([1.0, np.nan]), "f4"),
        (np.array([1.5], dtype=np.float16), "f2"),
        (np.array([True, False]), "u1"),
        (np.array([0.0, 1e6]), "f4"),
        (np.array([1e300]), "f4"),
    ],
)
def test_the_smallest_dtype_that_loses_nothing(values: np.ndarray, dtype: str) -> None:
    assert smallest(values).dtype == np.dtype(dtype)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (X, Y[:5], "rows"),
        (X[:0], Y[:0], "at least one"),
        (Y, Y, "shape"),
        (X, Y - 1, "labels"),
        (X, Y.astype(str), "labels"),
        (np.array([["a"]]), Y[:1], "numbers"),
        (np.array([[2**64 - 1]], dtype=np.uint64), Y[:1], "int64"),
    ],
)
def test_arrays_that_make_no_dataset_are_refused(tmp_path: Path, x: np.ndarray, y: np.ndarray, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        write_dataset(tmp_path / "d", x, y)
    assert not list(tmp_path.iterdir())


def test_scan_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small chunks, so that the row is found in a later one.
    monkeypatch.setattr(datasets, "CHUNK_BYTES", 32)
    path = tmp_path / "d"
    x = X.astype(np.float32)
    assert _fields(_written(path, x, Y)) == []
    assert _fields(_written(path, x, Y[:5])) == ["y"]
    assert _fields(_written(path, x[:0], Y[:0])) == ["x"]
    assert _fields(_written(path, x, Y), shape=(4,)) == ["x"]
    assert _fields(_written(path, x, Y.astype(np.float32))) == ["y"]
    assert _fields(_written(path, x, Y), classes=None) == ["y"]
    for bad in (np.nan, np.inf, -np.inf):
        wrong = x.copy()
        wrong[4, 1, 1] = bad
        assert "row 4 " in scan(_written(path, wrong, Y), (2, 2), 3)[0].description
        targets = Y.astype(np.float32)
        targets[5] = bad
        assert "row 5 " in scan(_written(path, x, targets), (2, 2), None)[0].description
    for bad in (1e39, -1e300):
        wide = X.astype(np.float64)
        wide[2, 0, 0] = bad
        assert "row 2 " in scan(_written(path, wide, Y), (2, 2), 3)[0].description
    for bad in (-1, 3, 2**62):
        labels = Y.copy()
        labels[3] = bad
        assert "row 3 " in scan(_written(path, x, labels), (2, 2), 3)[0].description
    assert _fields(_written(path, np.full((6, 2, 2), np.nan, np.float32), Y - 1)) == ["y", "x"]


def test_a_row_of_any_length_is_scanned_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CHUNK_BYTES", 4096)
    x = np.zeros((2, 50_000), np.float32)
    x[1, 49_999] = np.nan
    dataset = _written(tmp_path / "d", x, Y[:2])
    assert [len(piece) for _, piece in dataset.pieces("x")] == [1024] * 97 + [672]
    described = [violation.description for violation in scan(dataset, (4,), 3)]
    assert described == [
        "has rows of shape (50000,), but the model takes (4,)",
        "row 1 has a value that is NaN or infinite",
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_the_models_scale_makes_infinite_is_refused(tmp_path: Path, dtype: type) -> None:
    x = np.zeros((3, 4), dtype)
    x[2, 3] = -3e37
    dataset = _written(tmp_path / "d", x, Y[:3])
    for scale in (1.0, -10.0, 1e-6):
        assert scan(dataset, (4,), 3, input_scale=scale) == []
    for scale in (20.0, -20.0):
        (violation,) = scan(dataset, (4,), 3, input_scale=scale)
        assert violation.description == "row 2 has a value that is NaN or infinite once it is multiplied by 20"


@pytest.mark.parametrize("shape", [(2**62, 0), (2**62, 0, 2**62)])
def test_an_empty_tensor_of_any_shape_is_refused_as_one(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {
        "x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]},
        "y": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
    }
    header = json.dumps(tensors).encode()
    path = tmp_path / "d"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(DatasetError, match="which no array can have"):
        Dataset.open(path)


@pytest.mark.parametrize(("shape", "targets"), [((6,), 1), ((6, 1), 1), ((6, 3), 3), ((6, 0), 0)])
def test_a_regressions_targets_are_as_many_as_the_model_has_outputs(
    shape: tuple[int, ...], targets: int, tmp_path: Path
) -> None:
    dataset = _written(tmp_path / "d", X.astype(np.float32), np.zeros(shape, np.float32))
    assert scan(dataset, (2, 2), None) == []
    for outputs in (1, 2, 3):
        found = [violation.field for violation in scan(dataset, (2, 2), None, targets=outputs)]
        assert found == ([] if outputs == targets else ["y"])


def test_what_is_no_dataset_does_not_open(tmp_path: Path) -> None:
    path = tmp_path / "d"
    for raw in (b"", b"x" * 100, pickle.dumps({"x": 1})):
        path.write_bytes(raw)
        with pytest.raises(DatasetError):
            Dataset.open(path)
    for tensors in (
        {"x": X},
        {"x": X, "y": Y, "z": Y},
        {"x": Y, "y": Y},
        {"x": X, "y": Y.astype(np.int32)},
        {"x": X.astype(np.uint64), "y": Y},
    ):
        save_file(tensors, path)
        with pytest.raises(DatasetError):
            Dataset.open(path)
    save_file({"x": X, "y": Y}, path, metadata={"labels": "[[1]]"})
    with pytest.raises(DatasetError, match="labels"):
        Dataset.open(path)


def test_npz_keeps_the_shape_of_images_and_renames_any_integers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X.astype(np.float64), y=np.array([7, -3, 100, 7, -3, 100]))
    packed = pack(tmp_path / "a.npz", tmp_path / "d")
    assert packed == Packed(6, (2, 2), (-3, 7, 100))
    dataset = Dataset.open(tmp_path / "d")
    assert dataset.y.tolist() == [1, 0, 2, 1, 0, 2]
    assert dataset.labels == (-3, 7, 100)
    assert dataset.x.dtype == np.uint8


def test_npz_of_floats_is_a_regression_unless_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=np.array([1.0, 2, 3, 1, 2, 3]))
    assert pack(tmp_path / "a.npz", tmp_path / "d").labels is None
    assert Dataset.open(tmp_path / "d").y.dtype == np.float32
    assert pack(tmp_path / "a.npz", tmp_path / "d", regression=False).labels == (1, 2, 3)
    np.savez(tmp_path / "a.npz", x=X, y=np.array([1.5, 2, 3, 1, 2, 3]))
    with pytest.raises(DatasetError, match="fractions"):
        pack(tmp_path / "a.npz", tmp_path / "d", regression=False)


def test_npz_is_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    trap = np.empty(1, dtype=object)
    trap[0] = Trap()
    np.savez(tmp_path / "a.npz", x=trap, y=Y[:1])
    with pytest.raises(DatasetError, match=r"a\.npz"):
        pack(tmp_path / "a.npz", tmp_path / "d")
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(DatasetError):
        pack(tmp_path / "b.npz", tmp_path / "d")
    np.savez(tmp_path / "c.npz", x=X)
    with pytest.raises(DatasetError, match="'y'"):
        pack(tmp_path / "c.npz", tmp_path / "d")


@pytest.mark.parametrize(
    ("text", "labels", "x"),
    [
        ("1,2,dog\n3,4,cat\n", ("cat", "dog"), [[1, 2], [3, 4]]),
        ("a,b,kind\n1,2,dog\n3,4,cat\n", ("cat", "dog"), [[1, 2], [3, 4]]),
        ("y,a\n5,1.5\n9,2.5\n", (5, 9), [[1.5], [2.5]]),
        ("1,2,5\r\n\r\n3,4,9\r\n", (5, 9), [[1, 2], [3, 4]]),
    ],
)
def test_csv_with_and_without_a_header(tmp_path: Path, text: str, labels: tuple[object, ...], x: list[object]) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert pack(tmp_path / "a.csv", tmp_path / "d").labels == labels
    assert Dataset.open(tmp_path / "d").x.tolist() == x


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("a,y\n", "no rows"),
        ("1\n2\n", "at least one column"),
        ("1,2,3\n1,2\n", ":2:"),
        ("1,0\nx,0\n", ":2:"),
    ],
)
def test_csv_says_where_it_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DatasetError, match=said):
        pack(tmp_path / "a.csv", tmp_path / "d")


def test_sources_that_need_more_say_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pyarrow", "pyarrow.parquet", "PIL", "PIL.Image"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for source, package in (("a.parquet", "pyarrow"), ("images", "Pillow")):
        with pytest.raises(DatasetError, match=f"pip install {package}"):
            pack(tmp_path / source, tmp_path / "d")
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"must be \.npz"):
        pack(tmp_path / "a.pkl", tmp_path / "d")


def test_a_folder_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for label, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 7))):
        (tmp_path / "images" / label).mkdir(parents=True)
        image.new("RGB", (3, 2), colour).save(tmp_path / "images" / label / "1.png")
    assert pack(tmp_path / "images", tmp_path / "d") == Packed(2, (3, 2, 3), ("cat", "dog"))
    assert Dataset.open(tmp_path / "d").x[1, :, 0, 0].tolist() == [0, 0, 7]


def test_labels_are_json_in_the_files_metadata(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", X, Y, labels=[1, 2, 3])
    raw = (tmp_path / "d").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["labels"]) == [1, 2, 3]


def _save_to_disk(folder: Path, columns: dict[str, object]) -> None:
    """What `save_to_disk` of Hugging Face's datasets 5.2 writes."""
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    table = arrow.table(columns)
    data = str(folder / "data-00000-of-00001.arrow")
    with arrow.OSFile(data, "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


def test_a_hugging_face_dataset_is_packed(tmp_path: Path) -> None:
    _save_to_disk(tmp_path / "flat", {"a": [1, 2, 3], "b": [4.5, 5.5, 6.5], "label": [0, 1, 0]})
    _save_to_disk(tmp_path / "nested", {"label": [0, 1], "tokens": [[1, 2, 3], [4, 5, 6]]})
    assert pack(tmp_path / "flat", tmp_path / "a").row_shape == (2,)
    assert pack(tmp_path / "nested", tmp_path / "b").row_shape == (3,)
    dataset = Dataset.open(tmp_path / "b")
    assert dataset.x.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert dataset.y.tolist() == [0, 1]


def test_many_images_are_packed_without_being_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(40):
        folder = tmp_path / "images" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (200, 100), (number, 1, 2)).save(folder / f"{number:02}.png")
    pack(tmp_path / "images", tmp_path / "expected")
    monkeypatch.setattr("tiltyard.datasources.rows.BATCH_BYTES", 180_000)
    tracemalloc.start()
    try:
        pack(tmp_path / "images", tmp_path / "packed")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * 60_000 / 2
    assert (tmp_path / "packed").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_hugging_face_dataset_of_images_is_decoded(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    png = io.BytesIO()
    image.new("RGB", (4, 2), (1, 2, 3)).save(png, "png")
    _save_to_disk(tmp_path / "d", {"image": [{"bytes": png.getvalue(), "path": None}] * 2, "label": [0, 1]})
    assert pack(tmp_path / "d", tmp_path / "out").row_shape == (3, 2, 4)
    assert Dataset.open(tmp_path / "out").x[0, :, 0, 0].tolist() == [1, 2, 3]


def test_what_is_no_hugging_face_dataset_says_why(tmp_path: Path) -> None:
    _save_to_disk(tmp_path / "d" / "train", {"a": [1], "text": ["x"], "label": [0]})
    (tmp_path / "d" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DatasetError, match="has the splits train"):
        pack(tmp_path / "d", tmp_path / "out")
    with pytest.raises(DatasetError, match="column 'text' holds"):
        pack(tmp_path / "d" / "train", tmp_path / "out")
    _save_to_disk(tmp_path / "unlabelled", {"a": [1], "b": [2]})
    with pytest.raises(DatasetError, match="a column named label"):
        pack(tmp_path / "unlabelled", tmp_path / "out")
