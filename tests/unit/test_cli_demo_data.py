"""The demo's data: any rows and labels become a fair split and models that fit it."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiltyard.cli.connection import CommandError
from tiltyard.cli.demo.data import Rows, epochs_for, load_digits, load_npz, models_for, split
from tiltyard.modelspec import validate
from tiltyard.wire import model_spec_from_proto


def saved(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "d.npz", **arrays)
    return folder / "d.npz"


def labels(rows: Rows) -> list[str]:
    return [rows.labels[each] for each in rows.y]


def test_the_digits_are_1797_images_of_bytes() -> None:
    digits = load_digits()
    assert (digits.x.shape, str(digits.x.dtype), digits.classes) == ((1797, 8, 8), "uint8", 10)


def test_rows_are_divided_without_overlap_and_by_class() -> None:
    x = np.arange(1000, dtype=np.int32).reshape(-1, 1) + 1000
    y = np.arange(1000) % 4
    divided = split(Rows("numbers", x, y, ("0", "1", "2", "3")), shards=3)
    parts = (divided.evaluation, *divided.shards)
    # Standardising keeps the order, so the values still tell the rows apart.
    values = np.concatenate([part.x.ravel() for part in parts])
    assert len(np.unique(values)) == 1000
    assert len(divided.evaluation.y) == 300
    assert {len(shard.y) for shard in divided.shards} <= {233, 234}
    for part in parts:
        shares = np.bincount(part.y, minlength=4) / len(part.y)
        assert np.allclose(shares, 0.25, atol=0.01)


def test_a_split_is_the_same_every_time() -> None:
    first, second = split(load_digits(), shards=3), split(load_digits(), shards=3)
    assert np.array_equal(first.evaluation.x, second.evaluation.x)
    assert all(np.array_equal(a.y, b.y) for a, b in zip(first.shards, second.shards, strict=True))


@pytest.mark.parametrize(
    "y",
    [np.array([-5, 10**12] * 20), np.array([1.0, 2.0] * 20), np.array([True, False] * 20), np.array([[3], [8]] * 20)],
)
def test_any_whole_labels_will_do(tmp_path: Path, y: Any) -> None:
    rows = load_npz(saved(tmp_path, x=np.random.default_rng(0).normal(size=(40, 3)), y=y))
    assert rows.classes == 2
    assert set(rows.y.tolist()) == {0, 1}
    assert len(set(labels(rows))) == 2


def test_a_hundred_classes(tmp_path: Path) -> None:
    y = np.repeat(np.arange(100) * 7 - 3, 20)
    divided = split(load_npz(saved(tmp_path, x=np.random.default_rng(0).normal(size=(2000, 5)), y=y)), shards=4)
    for model in models_for(divided):
        assert validate(model_spec_from_proto(model.spec), max_parameters=10**8) == []
        assert model.spec.outputs == 100


@pytest.mark.parametrize(
    ("shape", "sample"),
    [((9,), (9,)), ((8, 8), (8, 8)), ((28, 28), (28, 28)), ((32, 32, 3), (3, 32, 32)), ((3, 5, 7), (3, 5, 7))],
)
def test_images_are_told_by_their_shape(tmp_path: Path, shape: tuple[int, ...], sample: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, size=(60, *shape)).astype(np.int64)
    rows = load_npz(saved(tmp_path, x=x, y=np.arange(60) % 3))
    assert rows.x.shape[1:] == sample
    # Bytes stay bytes, whatever they were stored as.
    assert rows.x.dtype == np.uint8
    divided = split(rows, shards=2)
    models = models_for(divided)
    assert len({model.spec.WhichOneof("architecture") for model in models}) == (3 if len(sample) > 1 else 2)
    assert len({model.spec.SerializeToString() for model in models}) == 3
    for model in models:
        assert tuple(model.spec.input_shape) == sample
        assert validate(model_spec_from_proto(model.spec), max_parameters=10**8) == []
    scaled = divided.evaluation.x * divided.input_scale + divided.input_offset
    assert 0.0 <= scaled.min() <= scaled.max() <= 1.01


def test_columns_with_units_of_their_own_are_levelled(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 3)) * [1e-3, 1.0, 1e5] + [0.0, 50.0, -1e6]
    divided = split(load_npz(saved(tmp_path, x=x, y=np.arange(500) % 2)), shards=2)
    trained = np.concatenate([shard.x for shard in divided.shards])
    assert np.allclose(trained.mean(axis=0), 0, atol=1e-3)
    assert np.allclose(trained.std(axis=0), 1, atol=1e-3)


def test_images_of_floats_are_standardised_inside_the_model(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(100, 20, size=(200, 6, 6))
    divided = split(load_npz(saved(tmp_path, x=x, y=np.arange(200) % 2)), shards=2)
    scaled = np.concatenate([shard.x for shard in divided.shards]) * divided.input_scale + divided.input_offset
    assert abs(scaled.mean()) < 0.01
    assert abs(scaled.std() - 1) < 0.01


def test_a_constant_column_stays_finite(tmp_path: Path) -> None:
    x = np.ones((40, 2))
    x[:, 0] = np.arange(40)
    divided = split(load_npz(saved(tmp_path, x=x, y=np.arange(40) % 2)), shards=2)
    assert np.isfinite(divided.evaluation.x).all()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 2))}, "no array y"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(5, int)}, "x has 4 rows, y has 5"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4, int)}, "one class"),
        ({"x": np.zeros((4, 2)), "y": np.array([0.5, 1, 0, 1])}, "integer labels"),
        ({"x": np.array(["a", "b"]), "y": np.array([0, 1])}, "numbers"),
        ({"x": np.zeros(4), "y": np.arange(4)}, "features or images"),
        ({"x": np.full((4, 2), np.nan), "y": np.arange(4)}, "NaN"),
        ({"x": np.zeros((4, 2)), "y": np.zeros((4, 2), int)}, "one label a row"),
        ({"x": np.array([[{}], [{}]], dtype=object), "y": np.array([0, 1])}, "plain arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        load_npz(saved(tmp_path, **arrays))


def test_a_file_that_is_no_whole_npz_is_refused_without_advice(tmp_path: Path) -> None:
    whole = saved(tmp_path, x=np.arange(80_000).reshape(-1, 2), y=np.arange(40_000) % 2)
    damaged = bytearray(whole.read_bytes())
    damaged[100:2000] = bytes(1900)
    array = io.BytesIO()
    np.save(array, np.zeros(4))
    for content in (b"text", b"", whole.read_bytes()[:-30], bytes(damaged), array.getvalue()):
        (tmp_path / "other.npz").write_bytes(content)
        with pytest.raises(CommandError, match="not a npz file of plain arrays") as caught:
            load_npz(tmp_path / "other.npz")
        assert "pickle" not in str(caught.value)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    rows = load_npz(saved(tmp_path, x=np.zeros((10, 2)), y=np.arange(10) % 2))
    with pytest.raises(CommandError, match="too few"):
        split(rows, shards=3)


def test_small_data_is_passed_over_more_often() -> None:
    assert epochs_for(400) > epochs_for(10_000) > epochs_for(100_000) >= 3
