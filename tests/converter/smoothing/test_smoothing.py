"""The smoothed model computes what the source computes, in every architecture; and what is folded into what."""

import numpy as np
import pytest

from bitwright.calibration.control import never, silent
from bitwright.calibration.statistics.activations import ActivationStatistics
from bitwright.calibration.statistics.smoothing import SmoothQuantConfig
from bitwright.converter.smoothing.folder import Folder, fold_norm
from bitwright.converter.smoothing.groups import smoothing_groups, unsmoothed
from bitwright.converter.smoothing.search import Smoother
from bitwright.formats.errors import ConvertError
from tests.calibration.stream.streaming import DictSource, random_corpus
from tests.converter.smoothing.smoothing_models import logits, observe, observe_again

ARCHITECTURES = ("llama", "llama-biases", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3", "phi3")


def assert_same_function(seen, view, directory, work_dir) -> None:
    source = logits(seen.checkpoint, directory, seen.corpus.tokens, work_dir / "source")
    smoothed = logits(view, directory, seen.corpus.tokens, work_dir / "smoothed")
    difference = np.linalg.norm(smoothed - source, axis=-1) / np.linalg.norm(source, axis=-1)
    assert difference.max() < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_factors_fold_exactly(name, tiny, tmp_path):
    seen = observe(tiny(name), tmp_path, random_corpus(name, 1))
    folder = Folder(seen.checkpoint)
    groups, rng = smoothing_groups(seen.checkpoint, seen.model_map), np.random.default_rng(5)
    for group in groups:
        for link in group.links:
            folder.fold(link, np.exp2(rng.uniform(-4, 4, link.rows[1] - link.rows[0])).astype(np.float32))
    assert not unsmoothed(groups, seen.model_map)
    matrices = {t.name for t in seen.model_map.tensors if t.quantizable and t.layer is not None}
    assert matrices <= set(folder.factors)
    view = folder.view()
    assert_same_function(seen, view, tiny(name), tmp_path)
    for stored, folding in folder.foldings.items():
        whole = view.read(stored)
        assert not np.array_equal(whole, seen.checkpoint.read(stored))
        if folding.values is None:
            np.testing.assert_array_equal(view.read(stored, 1, 3), whole[1:3])
            np.testing.assert_array_equal(view.read_rows(stored, np.array([3, 0])), whole[[3, 0]])
            np.testing.assert_allclose(view.read_columns(stored, 1, 3), whole[:, 1:3].T, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma3", "phi3"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, "auto"])
def test_the_function_stays_the_same(name, alpha, tiny, tmp_path):
    seen = observe(tiny(name), tmp_path, random_corpus(name, 2))
    view, _, groups = seen.smooth(alpha)
    if alpha != "auto":
        assert all(group.greatest > group.least for group in groups)
    assert_same_function(seen, view, tiny(name), tmp_path)


def test_one_side_alone_is_another_function(tiny, tmp_path):
    seen = observe(tiny("llama"), tmp_path, random_corpus(n_samples=1))
    view, _, _ = seen.smooth(1.0)
    half = {name: view.read(name) if "norm" in name else seen.checkpoint.read(name) for name in view.tensors}
    with pytest.raises(AssertionError):
        assert_same_function(seen, DictSource(half), tiny("llama"), tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3", "phi3"])
def test_inputs_are_divided_by_the_factors(name, tiny, tmp_path):
    """What the smoothed model's matrices see, observed, is what the source's see, divided."""
    seen = observe(tiny(name), tmp_path, random_corpus(name, 2))
    view, smoother, _ = seen.smooth(0.7)
    again = observe_again(view, seen.model_map, seen.corpus, tmp_path / "again")
    divided = smoother.folder.all_factors({spec.name: spec.n_matrices for spec in seen.model_map.tensors})
    assert set(again.inputs) == set(seen.activations.inputs)
    for tensor, inputs in seen.activations.inputs.items():
        factors = divided.get(tensor, 1.0)
        found = again.inputs[tensor]
        np.testing.assert_array_equal(found.counts, inputs.counts)
        largest = (inputs.absmax() / factors).max()
        np.testing.assert_allclose(found.absmax(), inputs.absmax() / factors, rtol=1e-3, atol=1e-4 * largest)
        np.testing.assert_allclose(found.squares, inputs.squares / np.square(factors), rtol=1e-2, atol=1e-6)
    derived = seen.activations.divided(divided, again)
    np.testing.assert_allclose(
        derived.importance().columns("blk.1.attn_output.weight"),
        again.importance().columns("blk.1.attn_output.weight"),
        rtol=1e-2,
        atol=1e-9,
    )


def test_a_bfloat16_norm_is_made_up_for():
    rng = np.random.default_rng(0)
    values = (rng.normal(1, 0.2, 500).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    values[:3] = 0, -0.5, 2.0**-24
    factors = np.exp2(rng.uniform(-13, 13, 500)).astype(np.float32)
    for plus_one in (False, True):
        for dtype in ("BF16", "F16", "F32"):
            stored, effective = fold_norm(values, factors, plus_one, dtype)
            whole = values.astype(np.float64) + plus_one
            np.testing.assert_allclose((stored.astype(np.float64) + plus_one) * effective, whole, rtol=1e-6)
            if dtype == "BF16":
                assert not (stored.view(np.uint32) & 0xFFFF).any()
                if not plus_one:
                    np.testing.assert_allclose(effective[3:], factors[3:], rtol=2**-8)
            if dtype == "F16":
                np.testing.assert_array_equal(stored, stored.astype(np.float16).astype(np.float32))
    # 1 + w of -1 + w' cannot come closer to zero than bfloat16 tells -1 from its neighbour.
    stored, effective = fold_norm(np.zeros(1, np.float32), np.array([2.0**13], np.float32), True, "BF16")
    assert np.isfinite(effective).all() and (1 + stored) * effective == 1


def test_a_matrix_without_statistics_is_an_error(tiny, tmp_path):
    seen = observe(tiny("llama"), tmp_path, random_corpus(n_samples=1))
    inputs = {name: of for name, of in seen.activations.inputs.items() if name != "blk.1.ffn_up.weight"}
    fewer = ActivationStatistics(inputs, None, None, "random", "0" * 64, 1, 200)
    smoother = Smoother(seen.checkpoint, fewer, seen.rows)
    with pytest.raises(ConvertError, match=r"no activation statistics[\s\S]*blk\.1\.ffn_up"):
        smoother.smooth(smoothing_groups(seen.checkpoint, seen.model_map), SmoothQuantConfig(), silent, never)
