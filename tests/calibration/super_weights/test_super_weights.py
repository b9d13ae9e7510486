"""What is planted is found, and nothing else; where nothing is planted the answer is none."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bitwright.calibration import places
from bitwright.calibration.control import Interrupted
from bitwright.calibration.sensitivity.fisher import stream_fisher
from bitwright.calibration.statistics.super_weights import SuperWeightReport
from bitwright.calibration.super_weights import spikes
from bitwright.calibration.super_weights.removals import Removals
from bitwright.calibration.super_weights.search import stream_super_weights, stream_trials
from bitwright.calibration.super_weights.spikes import PROMPTS, prompt_tokens
from bitwright.converter.measure.running import load_tokenizer
from bitwright.formats.errors import ConvertError
from tests.calibration.stream.streaming import DictSource, StopAfter, on_cpu
from tests.calibration.super_weights.planted import plant, projections, search, texts

DENSE = ("llama", "phi3", "qwen2")


@pytest.mark.parametrize("name", DENSE)
def test_exactly_the_planted_super_weight_is_found(name, tiny, tmp_path):
    source = DictSource.of(tiny(name))
    plant(source, 1, {(23, 71): -8.0})
    report = search(tiny(name), source, tmp_path)
    (weight,) = report.weights
    assert weight.place == (1, "blk.1.ffn_down.weight", 0, 23, 71)
    assert weight.value == -8.0 and weight.found_by == "spikes" and weight.share > 0.99
    assert weight.divergence_when_removed > 0.1
    assert report.looks == 2 and not report.rejected and not report.joint_sets and report.untried == 0
    assert (report.largest_spikes[1].row, report.largest_spikes[1].column) == (23, 71)


def test_a_super_weight_of_an_expert_is_found(tiny, tmp_path):
    source = DictSource.of(tiny("qwen3_moe"))
    plant(source, 1, {(40, 9): 8.0}, expert=5)
    (weight,) = search(tiny("qwen3_moe"), source, tmp_path).weights
    assert weight.place == (1, "blk.1.ffn_down_exps.weight", 5, 40, 9)
    assert weight.divergence_when_removed > 0.1


def test_a_super_weight_of_experts_stored_stacked_is_the_same(tiny, tmp_path):
    one_by_one = DictSource.of(tiny("qwen3_moe"))
    plant(one_by_one, 1, {(40, 9): 8.0}, expert=5)
    stacked = DictSource(dict(one_by_one.tensors))
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([stacked.tensors.pop(f"{stem}.{expert}.{kind}_proj.weight") for expert in range(8)])
            for kind in ("gate", "up", "down")
        )
        stacked.tensors |= {f"{stem}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{stem}.down_proj": down}
    stacked.reads = dict.fromkeys(stacked.tensors, 0)
    reports = [search(tiny("qwen3_moe"), s, tmp_path / str(i)) for i, s in enumerate((one_by_one, stacked))]
    assert reports[0] == reports[1] and len(reports[0].weights) == 1


def test_trials_that_others_have_made_are_not_made_again(tiny, tmp_path, monkeypatch):
    source = DictSource.of(tiny("llama"))
    plant(source, 1, {(23, 71): -8.0, (40, 71): 6.0, (11, 90): 7.0})
    whole = search(tiny("llama"), source, tmp_path / "whole")
    assert len(whole.weights) + len(whole.rejected) >= 3 and whole.joint_sets

    def subject(work_dir):
        model, control = on_cpu(source, tiny("llama"), work_dir, name="tiny")
        return model, projections(source), texts(1, 4).tokens, texts(2, 4), control

    lines = [line for i in range(2) for line in stream_trials(*subject(tmp_path / f"{i}"), slice(i, None, 2))]
    measured, measure = [], Removals._measure

    def noted(self, removals, part, stage):
        measured.extend(removals)
        measure(self, removals, part, stage)

    monkeypatch.setattr(Removals, "_measure", noted)
    assert stream_super_weights(*subject(tmp_path / "again"), known=lines) == whole
    assert measured and all(len(removal.weights) > 1 for removal in measured)


@pytest.mark.parametrize("name", [*DENSE, "qwen3_moe"])
def test_a_model_without_super_weights_gets_none_and_what_was_looked_at(name, tiny, tmp_path):
    report = search(tiny(name), DictSource.of(tiny(name)), tmp_path)
    assert not report.weights and not report.rejected and not report.joint_sets
    assert report.looks == 1 and report.perplexity is None
    assert [spike.layer for spike in report.largest_spikes] == [0, 1]
    assert all(1 < spike.row_ratio < 5 for spike in report.largest_spikes)


def test_a_spike_whose_removal_costs_nothing_is_rejected(tiny, tmp_path):
    """The tiny gemma3 repeats its last token, whatever the layers add."""
    source = DictSource.of(tiny("gemma3"))
    plant(source, 1, {(23, 71): -8.0})
    report = search(tiny("gemma3"), source, tmp_path)
    (rejected,) = report.rejected
    assert (rejected.layer, rejected.row, rejected.column) == (1, 23, 71)
    assert rejected.row_ratio > 50 and rejected.divergence_when_removed < 1e-6
    assert not report.weights and report.perplexity is not None


@pytest.mark.parametrize("places", [{(23, 71): 3000.0, (23, 30): 3000.0}, {(23, 71): 3000.0, (40, 71): 3000.0}])
def test_two_that_only_cost_together_are_found_together(places, tiny, tmp_path):
    """Half of the activation, or one of two channels, does all that the network needs."""
    source = DictSource.of(tiny("llama"))
    plant(source, 1, places)
    if len({row for row, _ in places}) == 2:  # both channels say the same
        head = source.tensors["lm_head.weight"]
        head[:, 40] = head[:, 23]
        source.tensors["model.norm.weight"][40] = source.tensors["model.norm.weight"][23]
    report = search(tiny("llama"), source, tmp_path)
    alone = [weight.divergence_when_removed for weight in report.weights]
    assert {(weight.row, weight.column) for weight in report.weights} == set(places)
    joint = [found for found in report.joint_sets if found.confirmed]
    assert joint and {(m.row, m.column) for m in joint[0].members} == set(places)
    assert joint[0].divergence_when_removed > 10 * max(alone)


def test_gradients_find_what_no_spike_shows(tiny, tmp_path, monkeypatch):
    source = DictSource.of(tiny("llama"))
    plant(source, 1, {(23, 71): -8.0})
    names = {p.source: (places.Place(p.tensor, p.matrix),) for p in projections(source)}
    corpus = texts(3, 4)
    model, control = on_cpu(source, tiny("llama"), tmp_path / "fisher")
    factors = stream_fisher(model, names, corpus, control)
    both = search(tiny("llama"), source, tmp_path / "both", factors=factors)
    assert both.criteria == ("spikes", "gradients") and both.weights[0].found_by == "spikes"
    monkeypatch.setattr(spikes, "SPIKE_RATIO", 1e9)
    report = search(tiny("llama"), source, tmp_path / "gradients", factors=factors)
    assert report.weights[0].place == (1, "blk.1.ffn_down.weight", 0, 23, 71)
    assert report.weights[0].found_by == "gradients" and report.looks == 1


def test_one_that_hides_behind_another_shows_when_that_is_zero(tiny, tmp_path):
    source = DictSource.of(tiny("llama"))
    plant(source, 1, {(23, 71): 100.0, (23, 30): 15.0})
    report = search(tiny("llama"), source, tmp_path)
    assert report.looks == 3
    assert {(w.row, w.column) for w in (*report.weights, *report.rejected)} == {(23, 71), (23, 30)}


def test_an_interrupted_search_continues_and_ends_with_the_same_report(tiny, tmp_path):
    source = DictSource.of(tiny("llama"))
    plant(source, 1, {(23, 71): -8.0})
    whole = search(tiny("llama"), source, tmp_path / "whole")
    interruptions = 0
    for _ in range(30):
        try:
            resumed = search(tiny("llama"), source, tmp_path / "work", should_stop=StopAfter(2))
            break
        except Interrupted:
            interruptions += 1
    assert interruptions > 1 and resumed.to_json() == whole.to_json()
    reads = dict(source.reads)
    assert search(tiny("llama"), source, tmp_path / "work") == whole
    assert source.reads["model.layers.0.self_attn.q_proj.weight"] == reads["model.layers.0.self_attn.q_proj.weight"]


def test_threads_change_nothing(tiny, tmp_path):
    source = DictSource.of(tiny("qwen3_moe"))
    plant(source, 1, {(40, 9): 8.0}, expert=5)
    reports = [search(tiny("qwen3_moe"), source, tmp_path / str(n), threads=n).to_json() for n in (1, 3)]
    assert reports[0] == reports[1]


def test_prompts_come_with_and_without_the_beginning_token(tiny):
    tokenizer = load_tokenizer(tiny("llama"))
    begin = tokenizer.bos_token_id
    samples = np.arange(3, 203).reshape(2, 100)
    tokens = prompt_tokens(tokenizer, samples, 32)
    assert tokens.shape == (2 * (len(PROMPTS) + 2), 32) and tokens.dtype == np.int32
    without, with_begin = np.split(tokens, 2)
    assert (with_begin[:, 0] == begin).all() and not (without == begin).any()
    np.testing.assert_array_equal(with_begin[:, 1:], without[:, :-1])
    np.testing.assert_array_equal(without[-1], samples[1, :32])
    assert len({tuple(row) for row in tokens.tolist()}) == len(tokens)


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory) -> SuperWeightReport:
    source = DictSource.of(tiny("llama"))
    plant(source, 1, {(23, 71): 3000.0, (23, 30): 3000.0})
    return search(tiny("llama"), source, tmp_path_factory.mktemp("search"))


def test_a_report_comes_back_as_it_was(report):
    assert report.joint_sets
    assert SuperWeightReport.from_json(report.to_json(), "here") == report
    nothing = replace(report, weights=(), rejected=(), joint_sets=(), perplexity=None, model=None)
    assert SuperWeightReport.from_json(nothing.to_json(), "here") == nothing


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: "",
        lambda d: "[" * 100000,
        lambda d: "3",
        lambda d: json.dumps(d | {"version": 2}),
        lambda d: json.dumps(d | {"weights": None}),
        lambda d: json.dumps(d | {"weights": [d["weights"][0] | {"row": -1}]}),
        lambda d: json.dumps(d | {"weights": [d["weights"][0] | {"row": 1.5}]}),
        lambda d: json.dumps(d | {"weights": [d["weights"][0] | {"value": float("nan")}]}),
        lambda d: json.dumps(d | {"weights": [d["weights"][0] | {"found_by": "luck"}]}),
        lambda d: json.dumps(d | {"weights": [d["weights"][0] | {"more": 1}]}),
        lambda d: json.dumps(d | {"joint_sets": [d["joint_sets"][0] | {"members": [3]}]}),
        lambda d: json.dumps(d | {"criteria": ["luck"]}),
        lambda d: json.dumps(d | {"looks": True}),
        lambda d: json.dumps({key: value for key, value in d.items() if key != "looks"}),
    ],
)
def test_a_damaged_report_is_refused(damage, report):
    text = damage(json.loads(report.to_json()))
    with pytest.raises(ConvertError, match="record of super weights is damaged") as caught:
        SuperWeightReport.from_json(text, "file.gguf")
    assert caught.value.where == "file.gguf"
