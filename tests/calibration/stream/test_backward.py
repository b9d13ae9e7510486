"""Streamed gradients equal autograd on the whole model; interrupted, resumed, on other threads: the same bytes."""

import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from bitwright.calibration.stream.backward import GradientStream
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.model import LayerwiseModel, Weights
from bitwright.calibration.text.corpus import Corpus
from tests.calibration.stream.streaming import DictSource, load_whole, on_cpu, random_corpus, with_config

MODELS = ("llama", "llama-tied", "qwen3", "qwen3_moe", "gemma3")
SAMPLES = 3


class Gradients:
    """An observer that sums the gradients themselves: parameter -> float32 [n_matrices, n_rows, n_columns]."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}

    def fresh(self, first: int) -> "Gradients":
        return Gradients()

    def observe(self, parameter, matrix, n_matrices, inputs, outputs) -> None:
        if not outputs.requires_grad:
            return
        inputs = inputs.detach().flatten(end_dim=-2)

        def add(gradients: torch.Tensor) -> None:
            product = gradients.flatten(end_dim=-2).T @ inputs
            self.sums.setdefault(parameter, torch.zeros(n_matrices, *product.shape))[matrix] += product

        outputs.register_hook(add)

    def observe_lookup(self, parameter, n_rows, tokens, gradients) -> None:
        total = self.sums.setdefault(parameter, torch.zeros(1, n_rows, gradients.shape[-1]))
        total[0].index_add_(0, tokens.flatten(), gradients.flatten(end_dim=-2))

    def merge(self, other: "Gradients") -> None:
        for parameter, gradients in other.sums.items():
            self.sums[parameter] = self.sums.get(parameter, 0) + gradients

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {parameter: gradients.numpy() for parameter, gradients in self.sums.items()}

    def load_arrays(self, arrays) -> None:
        self.sums = {parameter: torch.from_numpy(gradients) for parameter, gradients in arrays.items()}


def whole_gradients(directory: Path, corpus: Corpus, labels: str, seed: int) -> dict[str, torch.Tensor]:
    """By autograd of the sum of cross-entropies in the whole model; sampled labels are drawn by numpy from its own
    logits."""
    model = load_whole(directory)
    for i, sample in enumerate(torch.from_numpy(corpus.tokens).long()):
        logits = model(sample[None], use_cache=False).logits[0]
        if labels == "text":
            loss = torch.nn.functional.cross_entropy(logits[:-1], sample[1:], reduction="sum")
        else:
            cumulated = logits.detach().double().softmax(-1).numpy().cumsum(axis=1)
            uniform = np.random.default_rng([seed, i]).random(len(sample))
            drawn = torch.from_numpy((cumulated <= uniform[:, None]).sum(axis=1))
            loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def unsaturated(name: str, tiny, tmp_path: Path) -> Path:
    """The tiny gemma3 is so sure of its predictions that gradients vanish; a soft cap, as Gemma 2 has, mends that."""
    return with_config(tiny(name), tmp_path / name, final_logit_softcapping=3.0) if name == "gemma3" else tiny(name)


@pytest.mark.parametrize("labels", ["sampled", "text"])
@pytest.mark.parametrize("name", MODELS)
def test_streamed_equals_autograd_on_the_whole_model(name, labels, tiny, tmp_path):
    directory, corpus = unsaturated(name, tiny, tmp_path), random_corpus(name, SAMPLES)
    source = DictSource.of(directory)
    model, control = on_cpu(source, directory, tmp_path / "work")
    forward = LayerStream(model, corpus.tokens, control.within("forward"), keep=True)
    forward.run()
    observed = Gradients()
    GradientStream(forward, control.within("backward"), observed, labels=labels, seed=5).run()
    expected = whole_gradients(directory, corpus, labels, seed=5)
    if forward.config.tie_word_embeddings:
        both = observed.sums.pop("lm_head.weight") + observed.sums.pop("model.embed_tokens.weight")
        observed.sums["model.embed_tokens.weight"] = both
    assert observed.sums.keys() == {parameter for parameter, gradient in expected.items() if gradient.dim() > 1}
    for parameter, streamed in observed.sums.items():
        reference = expected[parameter].view(streamed.shape)
        difference = torch.linalg.vector_norm(streamed - reference) / torch.linalg.vector_norm(reference)
        assert difference < 1e-4, parameter


def test_two_layers_at_most_are_in_memory(tiny, tmp_path, monkeypatch):
    """The one that computes and the next one: when a third is read the first one's weights are gone."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, read = [], LayerwiseModel.read

    def watched(
        stream: LayerwiseModel, module: torch.nn.Module, copies: Sequence[LayerwiseModel] = ()
    ) -> list[Weights]:
        (weights,) = read(stream, module, copies)
        if module in stream.layers:
            alive.update(weights.values())
            most.append(len(alive) / len(weights))
        return [weights]

    monkeypatch.setattr(LayerwiseModel, "read", watched)
    corpus = random_corpus("gemma3", SAMPLES)
    source = DictSource.of(tiny("gemma3"))
    model, control = on_cpu(source, tiny("gemma3"), tmp_path)
    forward = LayerStream(model, corpus.tokens, control.within("forward"), keep=True)
    forward.run()
    GradientStream(forward, control.within("backward"), Gradients(), labels="text").run()
    assert len(most) == 2 * 6
    assert max(most) == 2
