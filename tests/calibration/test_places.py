"""Statistics go where a place says: the rows and columns of a GGUF's matrices among those of a stored tensor's."""

import numpy as np

from bitwright.calibration.passes.importance_pass import stream_importance
from bitwright.calibration.places import Place
from bitwright.calibration.sensitivity.fisher import stream_fisher
from bitwright.calibration.statistics.second_moments import open_moments
from tests.calibration.stream.streaming import DictSource, on_cpu, random_corpus, stacked_names

DOWN = "model.layers.1.mlp.down_proj.weight"
GATE_UP = "model.layers.1.mlp.gate_up_proj.weight"


def test_a_matrix_may_become_several() -> None:
    rows, columns = np.arange(6.0)[None], np.arange(4.0)[None]
    place = Place("k", 2, n_matrices=3)
    np.testing.assert_array_equal(place.of_rows(rows), [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(place.of_columns(columns), [[0, 1, 2, 3]] * 3)
    chosen = Place("v", 0, n_matrices=2, rows=np.array([5, 0, 1, 4]))
    np.testing.assert_array_equal(chosen.of_rows(rows), [[5, 0], [1, 4]])


def test_stored_columns_are_the_inverse_of_the_choice() -> None:
    order = np.random.default_rng(0).permutation(8)
    stored = np.arange(16.0).reshape(2, 8)
    place = Place("o", 0, columns=order)
    np.testing.assert_array_equal(place.of_columns(stored), stored[:, order])
    np.testing.assert_array_equal(place.stored_columns(place.of_columns(stored)), stored)


def test_importance_and_moments_follow_the_columns(tiny, tmp_path) -> None:
    source, corpus = DictSource.of(tiny("llama")), random_corpus()
    model, control = on_cpu(source, tiny("llama"), tmp_path)
    order = np.random.default_rng(1).permutation(source.tensors[DOWN].shape[1])
    names = {DOWN: (Place("plain", 0), Place("turned", 0, columns=order))}
    importance = stream_importance(model, names, corpus, control.within("pass"), tmp_path / "moments")
    np.testing.assert_array_equal(importance.sums["turned"], importance.sums["plain"][:, order])
    moments = open_moments(tmp_path / "moments")
    plain, turned = (moments.load(moments.group(name, 0)) for name in ("plain", "turned"))
    np.testing.assert_array_equal(turned.matrix, plain.matrix[np.ix_(order, order)])
    np.testing.assert_array_equal(turned.held_out, plain.held_out[:, order])


def test_parts_of_a_fused_matrix_have_their_own_rows(tiny, tmp_path) -> None:
    source, corpus = DictSource.of(tiny("phi3")), random_corpus("phi3")
    model, control = on_cpu(source, tiny("phi3"), tmp_path)
    n_rows = len(source.tensors[GATE_UP]) // 2
    halves = [Place(name, 0, rows=np.arange(i * n_rows, (i + 1) * n_rows)) for i, name in enumerate(("gate", "up"))]
    names = stacked_names(source.tensors) | {GATE_UP: (Place("whole", 0), *halves)}
    factors = stream_fisher(model, names, corpus, control)
    sums = {name: rows * factors.columns[name].sum() for name, rows in factors.rows.items()}
    np.testing.assert_allclose(np.concatenate([sums["gate"], sums["up"]], axis=1), sums["whole"], rtol=1e-5)
