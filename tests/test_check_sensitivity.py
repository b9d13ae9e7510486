"""The script that holds a sensitivity table against measurements: what it measures, and what it makes of it."""

import numpy as np
import pytest
import torch

from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.files.journal import read_lines
from scripts.check.sensitivity import Encoded, Result, Results, Source, rank_correlation, report
from tests.calibration.stream.streaming import load_whole
from tests.converter.measure.test_sensitivity import build, importance_of, random_factors


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_q.weight", "blk.3.ffn_up.weight", "output.weight"])
def test_the_divergence_is_that_of_the_whole_model(tiny, tmp_path, name):
    directory = tiny("llama-256")
    checkpoint = open_checkpoint(str(directory))
    model_map = describe(checkpoint)
    tokens = np.random.default_rng(0).integers(3, 400, (5, 12)).astype(np.int32)
    source = Source(directory, tokens)
    table = build(directory, tmp_path / "work", formats=("Q2_K",), sampled_rows=1)
    encoded = Encoded(checkpoint, model_map, importance_of(random_factors(model_map)), table)
    weights = encoded.weights(model_map.tensor(name), "Q2_K")
    divergence = source.divergence(weights, encoded.first_layer(model_map.tensor(name)))

    whole = load_whole(directory)
    with torch.inference_mode():
        log_p = whole(torch.from_numpy(tokens).long()).logits[:, 6:-1].log_softmax(-1)
        (changed,) = weights
        whole.get_parameter(changed).copy_(torch.from_numpy(weights[changed]))
        log_q = whole(torch.from_numpy(tokens).long()).logits[:, 6:-1].log_softmax(-1)
    assert divergence == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    assert divergence > 1e-5
    assert source.divergence({}, 0) == pytest.approx(0, abs=1e-7)  # the source's weights are back


def test_results_are_continued_and_not_mixed(tmp_path):
    path = tmp_path / "results.jsonl"
    Results(path, {"sensitivity": "a"}).add(Result("blk.0.ffn_up.weight", "Q2_K", 2.625, 0.5, 1.0))
    again = Results(path, {"sensitivity": "a"})
    assert ("blk.0.ffn_up.weight", "Q2_K") in again
    assert ("blk.0.ffn_up.weight", "Q3_K") not in again
    assert len(path.read_text().splitlines()) == 2
    assert next(read_lines(path)) == {"sensitivity": "a"}
    with pytest.raises(SystemExit, match="another table"):
        Results(path, {"sensitivity": "b"})


def test_the_report_has_correlation_ratio_and_plans():
    predicted, measured = [1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.4, 0.3]
    results = [Result(f"t{i}", "Q2_K", 2.625, predicted[i], measured[i]) for i in range(4)]
    results += [Result("0", "", 3.0, 0.5, 1.0), Result("1", "", 2.0, 1.0, 4.0)]
    text = report(results)
    assert text.splitlines()[2].endswith("4       0.800    10.0000    1.0000  10.00   10.00       8.25 to 12.33")
    assert [line.split()[0] for line in text.splitlines()[6:8]] == ["1", "0"]  # the plan of the fewest bits first
    assert rank_correlation(np.array(predicted), np.array(measured)) == pytest.approx(0.8)
    assert "rank correlation over the plans: 1.000" in text
