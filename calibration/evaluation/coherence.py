"""Whether generated text holds together: the ways in which the greedy text of a broken model fails, each by a measure.

Every measure stands beside the source's on the same prompt: a small model may loop by itself, and a list of planets has
little entropy in the best of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bitwright.calibration.evaluation.generation import Generation, Reading

# A loop: so many tokens at the end that repeat with one period, so often.
_LOOP_TOKENS, _LOOP_TIMES = 12, 3
# Or so large a share of the text's trigrams that have been there before, of so many at least.
_REPEATED_SHARE, _FEWEST_TRIGRAMS = 0.4, 12
# Nats of mean entropy and of mean surprise by which a text differs from the source's own before it counts. A mix of
# 4 bits stays within 0.7 of both on the prompts of the guard, models without use are 3 to 9 away.
_FLAT, _INCOHERENT = 2.0, 2.0
# A distribution has collapsed when nothing is left of the entropy, and of the source's there is.
_COLLAPSED, _NOT_COLLAPSED = 0.02, 0.2
# Of the source's text, a mean over fewer tokens says nothing, and of either text a mean entropy.
_FEWEST_TOKENS = 8

Kind = Literal["not finite", "empty", "loop", "collapsed", "flat", "incoherent"]


@dataclass(frozen=True)
class Problem:
    """One way in which a continuation fails; detail: the measure, for people."""

    kind: Kind
    detail: str


def problems(generation: Generation, reading: Reading, own: Generation, text: str, own_text: str) -> list[Problem]:
    """What is wrong with a continuation.

    reading: how the source reads it. own, own_text: the source's continuation of the same prompt.
    """
    failures: list[Problem] = []
    if not generation.finite:
        failures.append(Problem("not finite", f"the logits after {len(generation.tokens)} tokens are not finite"))
    elif not text.strip() and own_text.strip():
        failures.append(Problem("empty", "there is no text"))
    if (how := loop(generation.tokens)) and not loop(own.tokens):
        failures.append(Problem("loop", how))
    if not generation.tokens or len(own.tokens) < _FEWEST_TOKENS:
        return failures
    if len(generation.tokens) >= _FEWEST_TOKENS:
        failures += _problems_of_entropy(generation, own)
    # Of fewer tokens, too: one that makes no sense, and an end, are an answer to nothing.
    surprise, own_surprise = float(np.mean(reading.surprises)), float(np.mean(own.surprises))
    if surprise > own_surprise + _INCOHERENT:
        detail = f"the source finds {surprise:.2f} nats a token in it, {own_surprise:.2f} in its own text"
        failures.append(Problem("incoherent", detail))
    return failures


def _problems_of_entropy(generation: Generation, own: Generation) -> list[Problem]:
    failures = []
    entropy, own_entropy = float(np.mean(generation.entropies)), float(np.mean(own.entropies))
    beside = f"mean entropy {entropy:.2f} nats, the source's {own_entropy:.2f}"
    if entropy < _COLLAPSED and own_entropy > _NOT_COLLAPSED:
        failures.append(Problem("collapsed", beside))
    if entropy > own_entropy + _FLAT:
        failures.append(Problem("flat", beside))
    return failures


def loop(tokens: Sequence[int]) -> str | None:
    """How the tokens repeat themselves, None when they do not."""
    for period in range(1, len(tokens) // _LOOP_TIMES + 1):
        length = max(_LOOP_TIMES * period, _LOOP_TOKENS)
        if length > len(tokens):
            break
        end = tokens[len(tokens) - length :]
        if all(a == b for a, b in zip(end, end[period:], strict=False)):
            return f"the last {length} tokens repeat every {period}"
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    share = 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
    if len(trigrams) >= _FEWEST_TRIGRAMS and share > _REPEATED_SHARE:
        return f"{share:.0%} of its trigrams have been there before"
    return None
