"""Tensors that an artifact lays out otherwise than the checkpoint: read row by row, and put back."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bitwright.converter.model.module_map import places_of
from bitwright.converter.model.stored_rows import part_of_source, read_rows, restore
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.files.stored_tensor import StoredTensor
from bitwright.profiles.layout import Layout, Selection
from bitwright.profiles.vocabulary import Role, TensorSpec


def checkpoint(directory: Path, arrays: dict[str, np.ndarray]) -> Checkpoint:
    tensors = {}
    for name, array in arrays.items():
        path = directory / f"{name}.safetensors"
        save_file({name: array}, path)
        tensors[name] = StoredTensor("F32", array.shape, path, path.stat().st_size - array.nbytes)
    return Checkpoint(directory, "model", None, {}, tensors)


def tensor(shape: tuple[int, ...], stored: np.ndarray, layout: Layout, n_sources: int = 1) -> TensorSpec:
    sources = tuple(f"s{i}" for i in range(n_sources))
    return TensorSpec("t.weight", shape, Role.OTHER, 0, sources, layout=layout, stored_shape=stored.shape)


HALVES = Selection((2, 2, 4), (0, 2, 1), ((0, 2), (0, 2), (0, 4)))  # of 16 rows, two heads
EVEN = Selection((6, 2), (1, 0), ((0, 6), (0, 1)))  # of 12
LATER = Selection((4, 4), (0, 1), ((0, 4), (1, 4)))  # of 16, the last three of every four
RANDOM = np.random.default_rng(0)
MATRIX = RANDOM.normal(size=(16, 12)).astype(np.float32)
STACKED = RANDOM.normal(size=(3, 16, 12)).astype(np.float32)
VECTOR = RANDOM.normal(size=16).astype(np.float32)
# The first four as they are, then of the others the second two of every four, then the first two.
PIECES = Selection(
    (4,),
    (0,),
    ((0, 4),),
    0,
    Selection((3, 4), (0, 1), ((0, 3), (2, 4)), 4, Selection((3, 4), (0, 1), ((0, 3), (0, 2)), 4)),
)
CASES = {
    "rows": (MATRIX, Layout(HALVES), MATRIX.reshape(2, 2, 4, 12).swapaxes(1, 2).reshape(16, 12)),
    "columns": (MATRIX, Layout(columns=EVEN), MATRIX[:, ::2]),
    "rows and columns": (MATRIX, Layout(LATER, EVEN), MATRIX.reshape(4, 4, 12)[:, 1:].reshape(12, 12)[:, ::2]),
    "transposed": (MATRIX, Layout(transposed=True), MATRIX.T),
    "stacked, transposed": (STACKED, Layout(transposed=True), STACKED.swapaxes(1, 2)),
    "stacked, half of it, transposed": (STACKED, Layout(None, EVEN, True), STACKED.swapaxes(1, 2)[:, ::2]),
    "a matrix for every head": (MATRIX, Layout(LATER, None, True), MATRIX.reshape(4, 4, 12)[:, 1:].swapaxes(1, 2)),
    "several pieces": (MATRIX, Layout(PIECES), MATRIX[[0, 1, 2, 3, 6, 7, 10, 11, 14, 15, 4, 5, 8, 9, 12, 13]]),
    "plus one": (MATRIX, Layout(values="plus_one"), MATRIX + np.float32(1)),
    "decay": (VECTOR, Layout(values="negative_exponential"), -np.exp(VECTOR)[:, None]),
    "values of a vector": (VECTOR, Layout(HALVES), VECTOR.reshape(2, 2, 4).swapaxes(1, 2).reshape(16)),
    "another shape": (MATRIX[:, None, :], Layout(), MATRIX),
}


@pytest.mark.parametrize("case", CASES)
def test_any_rows_are_those_of_the_whole(tmp_path: Path, case: str) -> None:
    stored, layout, expected = CASES[case]
    spec = tensor(expected.shape, stored, layout)
    opened, rows = checkpoint(tmp_path, {"s0": stored}), expected.reshape(spec.n_rows, -1)
    for start, stop in [(0, spec.n_rows), (1, spec.n_rows), (spec.n_rows // 3, spec.n_rows // 2 + 1), (0, 0)]:
        found = read_rows(opened, spec, start, stop)
        assert found.dtype == np.float32 and found.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(found, rows[start:stop])


@pytest.mark.parametrize("case", CASES)
def test_restoring_puts_back_what_was_taken(tmp_path: Path, case: str) -> None:
    stored, layout, expected = CASES[case]
    spec = tensor(expected.shape, stored, layout)
    restored = restore(spec, expected.reshape(spec.n_rows, -1))["s0"]
    taken = part_of_source(spec)
    assert restored.shape == taken.shape == stored.shape
    assert taken.sum() == expected.size and np.isnan(restored[~taken]).all()
    np.testing.assert_allclose(restored[taken], stored[taken], rtol=1e-6, atol=1e-6)


def test_two_tensors_fill_the_source_that_they_share(tmp_path: Path) -> None:
    halves = [Selection((6, 2), (1, 0), ((0, 6), (i, i + 1))) for i in range(2)]
    specs = [tensor((16, 6), MATRIX, Layout(columns=half)) for half in halves]
    restored: dict[str, np.ndarray] = {}
    for i, spec in enumerate(specs):
        restore(spec, MATRIX[:, i::2], restored)
    np.testing.assert_array_equal(restored["s0"], MATRIX)


def test_a_stack_of_sources_is_read_across_them(tmp_path: Path) -> None:
    stored = {f"s{i}": STACKED[i] for i in range(3)}
    spec = tensor((3, 12, 16), STACKED[0], Layout(transposed=True), n_sources=3)
    expected = STACKED.swapaxes(1, 2).reshape(36, 16)
    np.testing.assert_array_equal(read_rows(checkpoint(tmp_path, stored), spec, 5, 31), expected[5:31])


def test_rows_far_apart_are_read_alone(tmp_path: Path) -> None:
    tall = RANDOM.normal(size=(640, 3)).astype(np.float32)
    first_of_each = Selection((4, 160), (1, 0), ((0, 4), (0, 1)))
    spec = tensor((4, 3), tall, Layout(first_of_each))
    np.testing.assert_array_equal(read_rows(checkpoint(tmp_path, {"s0": tall}), spec, 0, 4), tall[::160])


@pytest.mark.parametrize(
    "case", ["rows", "columns", "transposed", "stacked, transposed", "stacked, half of it, transposed"]
)
def test_statistics_of_a_stored_matrix_go_to_the_rows_and_columns_that_have_it(tmp_path: Path, case: str) -> None:
    """Of matrices whose values are the index of their output, or of their input, in the product with them."""
    stored, layout, expected = CASES[case]
    spec = tensor(expected.shape, stored, layout)
    (place,) = places_of([spec])["s0"]
    n_outputs, n_inputs = stored.shape[-2:][:: -1 if layout.transposed else 1]
    outputs, inputs = np.indices((n_outputs, n_inputs)).astype(np.float32)
    n_stored = len(stored) if stored.ndim == 3 else 1
    for index, of, axis in ((outputs, place.of_rows, 1), (inputs, place.of_columns, 0)):
        matrix = np.ascontiguousarray(index.T if layout.transposed else index)
        opened = checkpoint(tmp_path, {"s0": np.broadcast_to(matrix, stored.shape).copy()})
        as_artifact = read_rows(opened, spec, 0, spec.n_rows).reshape(spec.n_matrices, -1, spec.n_columns)
        values = np.arange(index.shape[1 - axis])[None].repeat(n_stored, axis=0)
        np.testing.assert_array_equal(of(values), as_artifact.mean(axis=1 + axis, dtype=np.float64))
        assert (place.tensor, place.matrix, place.n_matrices) == ("t.weight", 0, spec.n_matrices)


def test_what_the_runtime_multiplies_otherwise_has_no_statistics() -> None:
    spec = tensor((12, 16), MATRIX, Layout(transposed=True, observed=False))
    assert places_of([spec]) == {}
