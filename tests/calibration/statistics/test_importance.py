"""What the importance matrix makes of its sums; impossible ones are refused, and no plain module brings torch."""

import subprocess
import sys

import numpy as np
import pytest

from bitwright.calibration.statistics.importance import PRIOR_ROWS, ImportanceMatrix
from bitwright.formats.errors import ConvertError


def test_experts_share_what_all_have_seen():
    counts = np.array([1, 0, 3 * 10**6])
    means = np.array([[2.0, 4.0], [0.0, 0.0], [10.0, 20.0]])
    matrix = ImportanceMatrix({"e": means * counts[:, None]}, {"e": counts})
    columns = matrix.columns("e")
    prior = (means * counts[:, None]).sum(axis=0) / counts.sum()
    assert columns.dtype == np.float32
    np.testing.assert_allclose(columns[0], (means[0] + PRIOR_ROWS * prior) / (1 + PRIOR_ROWS), rtol=1e-6)
    np.testing.assert_allclose(columns[1], prior, rtol=1e-6)
    np.testing.assert_allclose(columns[2], means[2], rtol=1e-4)


def test_counts_that_tell_nothing_leave_each_expert_its_own_mean():
    sums = np.array([[2.0, 4.0], [6.0, 0.0]])
    np.testing.assert_array_equal(ImportanceMatrix({"e": sums}, {"e": np.array([2, 2])}).columns("e"), sums / 2)


def test_shared_statistics_come_closer_to_the_truth_for_rare_experts():
    random = np.random.default_rng(0)
    n_experts, n_columns = 64, 128
    truth = np.exp(random.normal(0, 1.5, n_columns)) * np.exp(random.normal(0, 0.4, (n_experts, n_columns)))
    counts = np.concatenate([np.full(32, 4), np.full(32, 4000)])
    rows = [random.normal(0, np.sqrt(mean), (n, n_columns)) for mean, n in zip(truth, counts, strict=True)]
    sums = np.array([np.square(of_expert).sum(axis=0) for of_expert in rows])
    shared, own = ImportanceMatrix({"e": sums}, {"e": counts}).columns("e"), sums / counts[:, None]

    def error(columns: np.ndarray, experts: slice) -> float:
        return float(np.square(np.log(columns[experts] / truth[experts])).mean())

    rare, frequent = slice(0, 32), slice(32, 64)
    assert error(shared, rare) < 0.5 * error(own, rare)
    assert error(shared, frequent) < 1.05 * error(own, frequent)


def test_notes_name_what_the_calibration_left_without():
    sums = {"a": np.ones((1, 2)), "e": np.array([[1.0, 1.0], [0.0, 0.0]]), "z": np.zeros((1, 2))}
    matrix = ImportanceMatrix(sums, {"a": np.array([4]), "e": np.array([4, 0]), "z": np.array([4])})
    experts, silent = matrix.notes()
    assert "some experts of 1 tensors, at most 1 of 2 (e)" in experts
    assert "1 tensors had no input but zeros" in silent and "(z)" in silent
    assert ImportanceMatrix({"a": np.ones((1, 2))}, {"a": np.array([4])}).notes() == []


def test_tensor_that_nothing_reached_is_uniform():
    matrix = ImportanceMatrix({"e": np.zeros((2, 3))}, {"e": np.zeros(2, int)})
    np.testing.assert_array_equal(matrix.columns("e"), np.ones((2, 3)))


@pytest.mark.parametrize(
    ("sums", "counts", "problem"),
    [
        ([[1.0, np.nan]], [1], "not finite"),
        ([[1.0, np.inf]], [1], "not finite"),
        ([[1.0, -1.0]], [1], "negative"),
        ([[1.0, 1.0]], [-1], "negative"),
        ([[1.0, 1.0]], [0], "no rows"),
        ([[1.0, 1.0]], [1, 1], "do not agree"),
        ([1.0, 1.0], [1], "do not agree"),
    ],
)
def test_impossible_statistics_are_refused(sums, counts, problem):
    with pytest.raises(ConvertError, match=problem) as caught:
        ImportanceMatrix({"blk.0.attn_q.weight": np.array(sums)}, {"blk.0.attn_q.weight": np.array(counts)})
    assert "blk.0.attn_q.weight" in caught.value.what


def test_plain_modules_import_no_torch():
    modules = ("control", "statistics.imatrix_file", "text.corpus", "sensitivity.table", "evaluation.quality")
    imported = ", ".join(f"bitwright.calibration.{module}" for module in modules)
    code = f"import sys, {imported}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
