"""Greedy generation, resident and streamed, equals transformers' own; readings equal its logits."""

import numpy as np
import pytest
import torch

from bitwright.calibration.control import Interrupted, PassControl
from bitwright.calibration.evaluation.generation import generate_greedily, stream_readings
from tests.calibration.evaluation.test_quality import uncertain, whole_logits
from tests.calibration.stream.streaming import DictSource, load_whole, on_cpu
from tests.tiny_models import VOCAB_SIZE

N_TOKENS = 12


def random_prompts(n: int = 5) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(3, VOCAB_SIZE, random.integers(2, 9)).tolist() for _ in range(n)]


def of_transformers(directory, prompts, end_tokens) -> list[list[int]]:
    """What `generate` of the whole model says, the end token included."""
    model = load_whole(directory)
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        answer = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=N_TOKENS,
            do_sample=False,
            eos_token_id=sorted(end_tokens),
            pad_token_id=0,
        )
        found.append(answer[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "qwen3_moe"])
def test_the_tokens_are_those_of_transformers(name, resident, tiny, tmp_path):
    prompts = random_prompts()
    free = of_transformers(tiny(name), prompts, {VOCAB_SIZE})
    end_tokens = frozenset({free[0][5]})  # so that some end early
    expected = of_transformers(tiny(name), prompts, end_tokens)
    source = DictSource.of(tiny(name))
    model, control = on_cpu(source, tiny(name), tmp_path)
    found = generate_greedily(model, prompts, N_TOKENS, end_tokens, control, resident=resident)
    assert [list(g.tokens) for g in found] == expected
    assert found[0].ended and len(found[0].tokens) <= 6
    assert [g.ended for g in found] == [g.tokens[-1] in end_tokens for g in found]
    assert all(g.finite and len(g.entropies) == len(g.surprises) == len(g.tokens) for g in found)


def test_both_ways_measure_the_same(tiny, tmp_path):
    model, control = on_cpu(uncertain(tiny("llama")), tiny("llama"), tmp_path)
    ways = [
        generate_greedily(model, random_prompts(), 8, frozenset(), control.within(str(way)), resident=way)
        for way in (True, False)
    ]
    for resident, streamed in zip(*ways, strict=True):
        assert resident.tokens == streamed.tokens
        assert resident.entropies == pytest.approx(streamed.entropies, abs=1e-4)
        assert resident.surprises == pytest.approx(streamed.surprises, abs=1e-4)


def test_readings_are_those_of_the_whole_models_logits(tiny, tmp_path):
    source, random = uncertain(tiny("llama")), np.random.default_rng(5)
    prompts = random_prompts(4)
    model, control = on_cpu(source, tiny("llama"), tmp_path)
    own = generate_greedily(model, prompts, 6, frozenset(), control.within("own"))
    continuations = [list(g.tokens) for g in own]
    continuations[1][3] = (continuations[1][3] + 1) % VOCAB_SIZE
    continuations[2] = random.integers(3, VOCAB_SIZE, 4).tolist()
    texts = list(zip(prompts, continuations, strict=True))
    readings = stream_readings(model, texts, control.within("read"))
    assert [r.agreed for r in readings][:2] == [6, 3] and readings[3].agreed == 6
    assert readings[0].surprises == pytest.approx(own[0].surprises, abs=1e-4)
    for i, ((prompt, continuation), reading) in enumerate(zip(texts, readings, strict=True)):
        logits = whole_logits(tiny("llama"), source, np.array([prompt + continuation]), tmp_path / f"whole-{i}")[0]
        log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_p -= logits.max(-1, keepdims=True)
        rows = log_p[len(prompt) - 1 : -1]
        assert reading.surprises == pytest.approx(-rows[range(len(continuation)), continuation], abs=1e-4)


def test_interrupted_and_continued_the_streamed_generation_is_the_same(tiny, tmp_path):
    source, prompts = DictSource.of(tiny("llama")), random_prompts(3)
    model, control = on_cpu(source, tiny("llama"), tmp_path / "whole")
    whole = generate_greedily(model, prompts, 6, frozenset(), control, resident=False)
    one_layer = PassControl(tmp_path / "work", should_stop=lambda: True)
    for _ in range(100):
        try:
            found = generate_greedily(model, prompts, 6, frozenset(), one_layer, resident=False)
            break
        except Interrupted:
            continue
    assert found == whole


def test_what_is_not_finite_ends_a_generation(tiny, tmp_path):
    source = DictSource.of(tiny("llama"))
    source.tensors["lm_head.weight"][7] = np.inf
    for resident in (True, False):
        model, control = on_cpu(source, tiny("llama"), tmp_path / str(resident))
        (found,) = generate_greedily(model, [[5, 6]], 4, frozenset(), control, resident=resident)
        assert not found.finite and found.tokens == () and not found.ended
