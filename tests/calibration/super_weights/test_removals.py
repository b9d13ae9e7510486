"""What removals cost: as whole passes without the weights tell it, each whatever it is measured beside."""

from functools import partial

import numpy as np
import pytest

from bitwright.calibration.evaluation.quality import Baseline
from bitwright.calibration.super_weights.removal_stream import Removal, WithoutWeights
from bitwright.calibration.super_weights.removals import Effect, Removals
from tests.calibration.stream.streaming import DictSource, on_cpu
from tests.calibration.super_weights.planted import plant, texts

DOWN = {"llama": "model.layers.{}.mlp.down_proj.weight", "qwen3_moe": "model.layers.{}.mlp.experts.5.down_proj.weight"}
CORPUS = texts(2, 5, 32)


def has_parts(n: int, effect: Effect) -> bool:
    return len(effect.parts) >= n


ALL = partial(has_parts, 99)


def planted(name: str, directory) -> tuple[DictSource, list[Removal]]:
    """A model in which weights of both layers matter, and removals of one, of others, and of both layers."""
    source = DictSource.of(directory)
    for layer in range(2):
        plant(source, layer, {(23, 9): 6.0, (40, 9): 6.0}, expert=5 if "moe" in name else None)
    first, second = (DOWN[name].format(layer) for layer in range(2))
    sets = [(0, (first, 23, 9)), (1, (second, 23, 9)), (1, (second, 23, 9), (second, 40, 9))]
    sets.append((0, (first, 40, 9), (second, 40, 9)))
    return source, [Removal(layer, tuple(weights)) for layer, *weights in sets]


@pytest.mark.parametrize("name", DOWN)
def test_copies_in_one_pass_are_what_whole_passes_are(name, tiny, tmp_path):
    source, removals = planted(name, tiny(name))
    model, control = on_cpu(source, tiny(name), tmp_path / "together", name="tiny")
    effects = Removals(model, CORPUS, control).stream_effects([(removal, ALL) for removal in removals], "try")
    baseline = Baseline(model, CORPUS, on_cpu(source, tiny(name), tmp_path / "whole")[1])
    for i, (removal, effect) in enumerate(zip(removals, effects, strict=True)):
        scores = baseline.stream_scores(WithoutWeights(source, removal.weights), f"without {i}")
        losses, divergence = scores[:2].mean(axis=1), scores[2]
        np.testing.assert_allclose(effect.loss, losses[1] - losses[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(effect.divergence, divergence.mean(), rtol=1e-4)
        np.testing.assert_allclose(effect.error, divergence.std(ddof=1) / np.sqrt(len(divergence)), rtol=1e-4)
        assert effect.divergence > 0.001
        alone, control = on_cpu(source, tiny(name), tmp_path / f"alone {i}", name="tiny")
        assert Removals(alone, CORPUS, control).stream_effects([(removal, ALL)], "try") == [effect]


def test_no_more_of_the_text_is_read_than_it_takes(tiny, tmp_path):
    source, removals = planted("llama", tiny("llama"))
    model, control = on_cpu(source, tiny("llama"), tmp_path, name="tiny")
    measured = Removals(model, CORPUS, control)
    assert measured.samples == 0 and measured.perplexity is None
    (one,) = measured.stream_effects([(removals[0], partial(has_parts, 1))], "try")
    assert measured.samples == 1 and [part.positions for part in one.parts] == [15]
    wanted = [(removals[0], partial(has_parts, 3)), (removals[1], partial(has_parts, 1))]
    three, other = measured.stream_effects(wanted, "try")
    assert measured.samples == 4 and [part.positions for part in three.parts] == [15, 15, 30]
    assert three.over(1) == one and len(other.parts) == 1
    (whole,) = measured.stream_effects([(removals[0], ALL)], "try")
    assert measured.samples == 5 and whole.over(3) == three


def test_a_single_position_tells_nothing(tiny, tmp_path):
    source, removals = planted("llama", tiny("llama"))
    model, control = on_cpu(source, tiny("llama"), tmp_path, name="tiny")
    measured = Removals(model, texts(2, 3, 4), control)
    (effect,) = measured.stream_effects([(removals[0], lambda effect: effect.error < np.inf)], "try")
    assert [part.positions for part in effect.parts] == [1, 1]


def test_a_pass_that_is_known_in_part_goes_on_with_the_rest(tiny, tmp_path):
    """As a kill leaves it between two lines of the journal."""
    source, removals = planted("llama", tiny("llama"))
    wanted = [(removal, partial(has_parts, 2)) for removal in removals]
    model, control = on_cpu(source, tiny("llama"), tmp_path, name="tiny")
    effects = Removals(model, CORPUS, control).stream_effects(wanted, "try")
    journal = tmp_path / "removals.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    reads = dict(source.reads)
    assert Removals(model, CORPUS, control).stream_effects(wanted, "try") == effects
    assert source.reads["model.layers.1.mlp.down_proj.weight"] > reads["model.layers.1.mlp.down_proj.weight"]
    reads = dict(source.reads)
    assert Removals(model, CORPUS, control).stream_effects(wanted, "try") == effects
    assert source.reads == reads
