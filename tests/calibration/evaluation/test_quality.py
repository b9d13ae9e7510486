"""Quality through two streams equals the whole models' logits side by side; interruption changes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bitwright.calibration.control import Interrupted
from bitwright.calibration.evaluation.generation import generate_greedily
from bitwright.calibration.evaluation.quality import Baseline, QualityReport, stream_quality
from bitwright.calibration.text.corpus import Corpus
from bitwright.formats.errors import ConvertError
from tests.calibration.stream.streaming import DictSource, load_whole, on_cpu, random_corpus, with_config
from tests.tiny_models import VOCAB_SIZE


def with_noise(source: DictSource, scale: float = 0.2) -> DictSource:
    random = np.random.default_rng(1)
    return DictSource(
        {
            name: (w * (1 + scale * random.standard_normal(w.shape))).astype(np.float32)
            for name, w in source.tensors.items()
        }
    )


def whole_logits(directory: Path, source: DictSource, tokens: np.ndarray, tmp_path: Path) -> np.ndarray:
    """float64 [n_samples, sequence_length, vocabulary] of the model with these weights."""
    from safetensors.numpy import save_file

    changed = with_config(directory, tmp_path)
    for shard in changed.glob("*.safetensors*"):
        shard.unlink()
    shapes = {name: p.shape for name, p in load_whole(directory).named_parameters()}
    tensors = {n: np.ascontiguousarray(w.reshape(shapes.get(n, w.shape))) for n, w in source.tensors.items()}
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        return load_whole(changed)(torch.from_numpy(tokens).long()).logits.double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def uncertain(directory: Path) -> DictSource:
    """The model's weights with an embedding so small that the layers, not the last token, decide what follows."""
    source = DictSource.of(directory)
    source.tensors["model.embed_tokens.weight"] *= 0.05
    return source


def run(
    directory: Path,
    work_dir: Path,
    candidate: DictSource,
    corpus: Corpus,
    source: DictSource | None = None,
    words: np.ndarray | None = None,
    **options,
) -> QualityReport:
    model, control = on_cpu(source or DictSource.of(directory), directory, work_dir, **options)
    return stream_quality(model, candidate, corpus, control, words=words)


def baseline_of(source: DictSource, directory: Path, corpus: Corpus, work_dir: Path, *, keep: bool = False) -> Baseline:
    model, control = on_cpu(source, directory, work_dir)
    return Baseline(model, corpus, control, keep=keep)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "qwen3_moe", "gemma3 softcapped"])
def test_streamed_equals_the_whole_models_logits(name, tiny, tmp_path):
    name, _, capped = name.partition(" ")
    directory = tiny(name)
    if capped:
        directory = with_config(directory, tmp_path / "capped", final_logit_softcapping=0.5)
    corpus, source = random_corpus(name), uncertain(directory)
    candidate = with_noise(source)
    report = run(directory, tmp_path / "work", candidate, corpus, source)

    # The second half is scored: positions L // 2 to L - 2 predict the tokens that follow them.
    length = corpus.tokens.shape[1]
    following = corpus.tokens[:, length // 2 + 1 :, None].astype(int)
    logits_p, logits_q = (
        whole_logits(directory, weights, corpus.tokens, tmp_path / kind)[:, length // 2 : -1]
        for kind, weights in (("source", source), ("candidate", candidate))
    )
    log_p, log_q = log_softmax(logits_p), log_softmax(logits_q)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).ravel()
    expected = {
        "source_perplexity": np.exp(-np.take_along_axis(log_p, following, -1).mean()),
        "perplexity": np.exp(-np.take_along_axis(log_q, following, -1).mean()),
        "mean_kld": divergence.mean(),
        "kld_99": np.quantile(divergence, 0.99),
        "kld_99_9": np.quantile(divergence, 0.999),
        "max_kld": divergence.max(),
        "top1_agreement": (logits_p.argmax(-1) == logits_q.argmax(-1)).mean(),
        "tokens": divergence.size,
    }
    assert divergence.mean() > 0.001
    measured = report.to_dict()
    assert {key: measured[key] for key in expected} == pytest.approx(expected, rel=2e-4)
    assert (report.corpus, report.samples, report.sequence_length) == ("random", *corpus.tokens.shape)


def test_words_are_found_as_a_greedy_reader_completes_them(tiny, tmp_path):
    """On a text that the source has written itself, the source finds all; the candidate what its logits say."""
    source = uncertain(tiny("llama"))
    candidate = with_noise(source, 0.03)
    prompts = np.random.default_rng(2).integers(3, VOCAB_SIZE, (6, 4)).tolist()
    model, control = on_cpu(source, tiny("llama"), tmp_path / "own")
    own = generate_greedily(model, prompts, 28, frozenset(), control)
    tokens = np.array([[*prompt, *answer.tokens] for prompt, answer in zip(prompts, own, strict=True)], np.int32)
    corpus = Corpus(tokens, "own", "0" * 64)
    words = np.arange(tokens.size).reshape(tokens.shape) // 3  # one of each sample begins before what is scored
    report = run(tiny("llama"), tmp_path / "work", candidate, corpus, source, words=words)

    logits = whole_logits(tiny("llama"), candidate, tokens, tmp_path / "whole")[:, 16:-1]
    hits, scored = logits.argmax(-1) == tokens[:, 17:], words[:, 17:]
    whole = [n for n in np.unique(scored) if n not in words[:, :17]]
    assert report.words == len(whole) > 20
    assert report.source_next_word_accuracy == 1
    assert report.next_word_accuracy == pytest.approx(np.mean([hits[scored == n].all() for n in whole]))
    assert 0 < report.next_word_accuracy < 1
    untold = run(tiny("llama"), tmp_path / "untold", candidate, corpus, source)
    assert untold.words == 0 and untold.next_word_accuracy is None and untold.mean_kld == report.mean_kld


def test_model_compared_with_itself_is_the_same(tiny, tmp_path):
    report = run(tiny("qwen3"), tmp_path / "work", DictSource.of(tiny("qwen3")), random_corpus("qwen3"))
    assert report.perplexity == report.source_perplexity
    assert report.top1_agreement == 1
    assert abs(report.max_kld) < 1e-6


def test_interrupted_at_every_point_ends_with_the_same_report(tiny, tmp_path):
    corpus, candidate = random_corpus(), with_noise(DictSource.of(tiny("llama")))
    whole = run(tiny("llama"), tmp_path / "whole", candidate, corpus)
    for _ in range(5):  # after each of two layers, twice, and amid the comparison
        with pytest.raises(Interrupted):
            run(tiny("llama"), tmp_path / "work", candidate, corpus, should_stop=lambda: True)
    assert run(tiny("llama"), tmp_path / "work", candidate, corpus) == whole


def test_checkpoint_of_other_weights_is_refused(tiny, tmp_path):
    corpus, candidate = random_corpus(), with_noise(DictSource.of(tiny("llama")))
    with pytest.raises(Interrupted):
        run(tiny("llama"), tmp_path, candidate, corpus, name="A", should_stop=lambda: True)
    with pytest.raises(ConvertError, match="another run's: weights is 'A@None' there and 'B@None' here"):
        run(tiny("llama"), tmp_path, candidate, corpus, name="B")


def test_nothing_is_left_of_a_finished_comparison(tiny, tmp_path):
    run(tiny("llama"), tmp_path, with_noise(DictSource.of(tiny("llama"))), random_corpus())
    assert list(tmp_path.iterdir()) == []


def test_samples_too_short_to_score_are_refused(tiny, tmp_path):
    corpus = Corpus(random_corpus().tokens[:, :3], "short", "0" * 64)
    with pytest.raises(ConvertError, match="samples of 3 tokens leave nothing to score"):
        run(tiny("llama"), tmp_path, DictSource.of(tiny("llama")), corpus)


def divergent(directory: Path) -> DictSource:
    weights = DictSource.of(directory)
    weights.tensors["lm_head.weight"][7] = np.inf
    return weights


def test_a_candidate_that_predicts_nothing_finite_is_a_finding(tiny, tmp_path):
    report = run(tiny("llama"), tmp_path, divergent(tiny("llama")), random_corpus())
    assert report.not_finite == report.tokens and report.top1_agreement == 0
    figures = (report.perplexity, report.mean_kld, report.kld_99, report.kld_99_9, report.max_kld)
    assert figures == (None,) * 5 and report.source_perplexity > 1
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_perplexity_beyond_all_numbers_is_none(tiny, tmp_path):
    candidate = DictSource.of(tiny("llama"))
    candidate.tensors["lm_head.weight"] *= 1e4
    report = run(tiny("llama"), tmp_path, candidate, random_corpus())
    assert report.perplexity is None and report.not_finite == 0 and report.mean_kld > 700
    json.dumps(report.to_dict(), allow_nan=False)


def test_predictions_that_are_not_finite_are_refused_of_the_source_and_where_losses_are_added_up(tiny, tmp_path):
    directory, corpus = tiny("llama"), random_corpus()
    with pytest.raises(ConvertError, match="predictions are not finite"):
        run(directory, tmp_path / "source", DictSource.of(directory), corpus, divergent(directory))
    baseline = baseline_of(DictSource.of(directory), directory, corpus, tmp_path / "losses")
    with pytest.raises(ConvertError, match="predictions are not finite"):
        baseline.stream_scores(divergent(directory))


def test_several_candidates_share_one_run_of_the_source(tiny, tmp_path):
    directory, corpus = tiny("llama"), random_corpus()
    source = uncertain(directory)
    baseline = baseline_of(source, directory, corpus, tmp_path / "shared")
    for i, scale in enumerate((0.2, 0.1)):
        candidate = with_noise(source, scale)
        scores = baseline.stream_scores(candidate, f"candidate {i}")
        alone = run(directory, tmp_path / f"alone {i}", candidate, corpus, source)
        assert scores[2].mean() == alone.mean_kld and np.exp(scores[1].mean()) == alone.perplexity
    # Twice alone, once here.
    assert source.reads["model.layers.0.mlp.up_proj.weight"] == 3
    baseline.discard()
    assert not list((tmp_path / "shared").iterdir())


def test_layers_that_are_the_same_are_taken_over(tiny, tmp_path):
    directory, corpus = tiny("gemma3"), random_corpus("gemma3")
    source = uncertain(directory)
    late = {name: w for name, w in source.tensors.items() if ".layers.4." in name or ".layers.5." in name}
    candidate = DictSource(source.tensors | {name: w * np.float32(1.1) for name, w in late.items()})
    kept = baseline_of(source, directory, corpus, tmp_path / "kept", keep=True)
    scores = kept.stream_scores(candidate, "late", first_layer=4)
    assert {name for name, n in candidate.reads.items() if n and ".layers." in name} == set(late)
    whole = baseline_of(source, directory, corpus, tmp_path / "whole")
    np.testing.assert_array_equal(scores, whole.stream_scores(candidate, "all", first_layer=4))
    assert scores[2].mean() > 0
