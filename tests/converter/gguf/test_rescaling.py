"""Rescaled neurons compute the same function in every architecture, and are read alike whole and in parts."""

from dataclasses import replace

import numpy as np
import pytest

from bitwright.calibration.evaluation.quality import stream_quality
from bitwright.converter.gguf.rescale_search import choose_factors
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.rescaled import rescale_importance
from bitwright.converter.model.stored_rows import read_rows, restore
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.plan import PlannedTensor
from bitwright.profiles.planning.protect import rescaled_specs, with_specs
from bitwright.profiles.vocabulary import DOWN_ROLES, Rescaled
from tests.calibration.stream.streaming import DictSource, on_cpu, random_corpus

ARCHITECTURES = ("llama", "llama-biases", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3", "phi3")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_function_stays_the_same(name, tiny, tmp_path):
    checkpoint = open_checkpoint(str(tiny(name)))
    model_map = describe(checkpoint)
    changed = model_map
    for spec in model_map.tensors:
        if spec.role in DOWN_ROLES:
            last = spec.n_matrices - 1
            changed = with_specs(changed, rescaled_specs(changed, spec.name, {(0, 3): 3.7, (last, 17): 0.013}))
    weights = {}
    for spec in changed.tensors:
        weights |= restore(spec, read_rows(checkpoint, spec, 0, spec.n_rows))
    source = DictSource.of(tiny(name))
    n_changed = sum(
        not np.array_equal(weights[key], source.tensors[key].reshape(weights[key].shape)) for key in weights
    )
    assert n_changed >= 2 * model_map.n_layers
    model, control = on_cpu(source, tiny(name), tmp_path)
    report = stream_quality(model, DictSource(weights), random_corpus(name, 1), control)
    # The same up to the rounding of float32; with one side rescaled only, it is another function.
    assert report.max_kld < 1e-6 and report.top1_agreement == 1
    assert report.perplexity == pytest.approx(report.source_perplexity, rel=1e-4)


def test_one_side_alone_is_another_function(tiny, tmp_path):
    checkpoint = open_checkpoint(str(tiny("llama")))
    model_map = describe(checkpoint)
    specs = rescaled_specs(model_map, "blk.1.ffn_down.weight", {(0, n): 3.7 for n in range(8)})
    source = DictSource.of(tiny("llama"))
    half = dict(source.tensors)
    spec = specs["blk.1.ffn_down.weight"]
    half |= restore(spec, read_rows(checkpoint, spec, 0, spec.n_rows))
    model, control = on_cpu(source, tiny("llama"), tmp_path)
    report = stream_quality(model, DictSource(half), random_corpus(n_samples=1), control)
    assert report.mean_kld > 1e-3


def test_parts_are_rescaled_as_the_whole_is(tiny):
    checkpoint = open_checkpoint(str(tiny("qwen3_moe")))
    model_map = describe(checkpoint)
    down = "blk.1.ffn_down_exps.weight"
    specs = rescaled_specs(model_map, down, {(0, 0): 2.0, (5, 9): 3.0, (7, 31): 5.0})
    for spec in specs.values():
        whole = read_rows(checkpoint, spec, 0, spec.n_rows)
        plain = read_rows(checkpoint, model_map.tensor(spec.name), 0, spec.n_rows)
        rows = spec.n_rows // spec.n_matrices
        for part in spec.rescaled:
            index = (
                (part.matrix * rows + part.index,)
                if part.axis == "row"
                else (slice(part.matrix * rows, (part.matrix + 1) * rows), part.index)
            )
            np.testing.assert_allclose(whole[index], plain[index] * part.factor, rtol=2e-7)
            plain[index] = whole[index]
        np.testing.assert_array_equal(whole, plain)
        for start, stop in (
            (0, 1),
            (5, 70),
            (rows - 1, rows + 1),
            (3 * rows, 6 * rows + 5),
            (spec.n_rows - 1, spec.n_rows),
        ):
            np.testing.assert_array_equal(read_rows(checkpoint, spec, start, stop), whole[start:stop])


def test_importance_follows_the_inputs():
    columns = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    rescaled = (Rescaled("column", 1, 2, 0.25), Rescaled("row", 0, 0, 7.0))
    np.testing.assert_array_equal(rescale_importance(rescaled, columns), [[1, 2, 3], [4, 5, 96]])


class Stored:
    """A checkpoint of one matrix."""

    def __init__(self, weights: np.ndarray):
        self.weights = weights

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.weights[start:stop]


@pytest.mark.parametrize(
    ("format_name", "scaled"),
    [("TQ2_0", False), ("Q2_K", False), ("Q4_0", False), ("IQ2_XXS", False), ("NVFP4", True), ("NVFP4", False)],
)
def test_the_factor_lets_the_weight_land_and_spares_its_neighbours(format_name, scaled, tiny):
    """scaled: with a second-level scale, which a plan leaves out where the runtime does not apply it."""
    random = np.random.default_rng(0)
    weights = random.standard_normal((256, 512)).astype(np.float32)
    weights[5, 300] = 60.0
    checkpoint = open_checkpoint(str(tiny("llama-256")))
    spec = next(t for t in describe(checkpoint).tensors if t.name == "blk.0.ffn_down.weight")
    planned = PlannedTensor(replace(spec, scale_applied=scaled), format_name, "")
    importance = np.ones((1, 512), np.float32)
    stored = Stored(weights)
    (found,) = choose_factors(_With(stored, spec), planned, [(0, 5, 300)], importance, 0.05, "fast")
    assert found[:2] == (0, 300)
    block_format = get_format(format_name)

    def error(factor: float) -> tuple[float, float]:
        """Of the weight itself, and the squared error of its row, as the network sees them."""
        row = weights[5:6].copy()
        row[0, 300] /= factor
        columns = importance[0].copy()
        columns[300] *= factor**2
        scale = block_format.tensor_scale(float(np.abs(row).max())) if scaled else 1.0
        decoded = block_format.decode(block_format.encode(row / np.float32(scale), columns, "fast")) * scale
        decoded[0, 300] *= factor
        return abs(decoded[0, 300] / 60 - 1), float(np.square(decoded - weights[5:6]).sum())

    assert error(found[2])[0] <= 0.05
    assert error(found[2])[1] < error(1.0)[1]


class _With:
    """The checkpoint of a matrix under the names that the spec has."""

    def __init__(self, stored: Stored, spec):
        self.read, self.tensors = stored.read, dict.fromkeys(spec.sources)
