"""The guard's detectors on texts and distributions made up to fail in one way each."""

import numpy as np
import pytest

from bitwright.calibration.evaluation.coherence import loop, problems
from bitwright.calibration.evaluation.generation import Generation, GreedyRecord, Reading

HEALTHY = tuple(range(100, 132))


def generation(tokens=HEALTHY, entropy=1.5, surprise=0.6, ended=False, finite=True) -> Generation:
    n = len(tokens)
    return Generation(tuple(tokens), (entropy,) * n, (surprise,) * n, ended, finite)


def kinds(made: Generation, *, surprise=0.8, own=None, text="a text", own_text="a text") -> list[str]:
    reading = Reading(0, (surprise,) * len(made.tokens))
    return [problem.kind for problem in problems(made, reading, own or generation(), text, own_text)]


def test_a_healthy_text_has_no_problem():
    assert kinds(generation()) == []
    # As a 4-bit mix writes: a little flatter, a little more surprising.
    assert kinds(generation(entropy=2.2), surprise=1.4) == []
    # A short answer that ended is no failure.
    assert kinds(generation(HEALTHY[:3], ended=True)) == []


@pytest.mark.parametrize("period", [1, 2, 3, 5, 8, 10])
def test_every_period_of_a_loop_is_found(period):
    tokens = [7, 8, *list(range(100, 100 + period)) * 32][:32]
    assert f"every {period}" in loop(tokens)
    assert kinds(generation(tokens)) == ["loop"]


def test_a_loop_with_a_counter_is_one():
    lines = [token for i in range(4) for token in (50, 60 + i, 51, 52, 53, 54, 55, 56, 57)]
    assert "trigrams" in loop(lines)


@pytest.mark.parametrize(
    "tokens",
    [
        HEALTHY,
        [1, 2, 3, 4] * 2 + list(range(10, 34)),  # said twice, then on
        [t for i in range(8) for t in (i, 100 + i, 200 + i, 44)],  # a list of rows
        [5] * 11,  # too short to tell
        [],
    ],
)
def test_what_is_no_loop(tokens):
    assert loop(tokens) is None


def test_a_loop_of_the_source_is_not_the_artifacts_fault():
    looping = generation([4, 5] * 16)
    assert kinds(looping) == ["loop"]
    assert kinds(looping, own=generation([9] * 32)) == []


def test_each_failure_has_its_name():
    assert kinds(generation(entropy=6.0)) == ["flat"]
    assert kinds(generation(), surprise=5.0) == ["incoherent"]
    assert kinds(generation(entropy=0.001)) == ["collapsed"]
    assert kinds(generation(entropy=0.001), own=generation(entropy=0.1)) == []
    assert kinds(generation((2,), ended=True), text="  \n") == ["empty"]
    assert kinds(generation((2,), ended=True), text="", own_text="") == []
    assert kinds(generation((), finite=False), text="") == ["not finite"]
    assert kinds(generation([3] * 32, entropy=7.0), surprise=6.0) == ["loop", "flat", "incoherent"]


def test_a_word_without_sense_and_an_end_are_no_answer():
    """However short: but where the source says little itself, there is nothing to compare with."""
    junk = generation((77, 2), entropy=8.0, ended=True)
    assert kinds(junk, surprise=9.0) == ["incoherent"]
    assert kinds(junk, surprise=9.0, own=generation((5, 2), ended=True)) == []
    assert kinds(generation((), ended=False)) == []


def test_a_record_measures_what_numpy_computes():
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32) * 3
    record = GreedyRecord(3, frozenset({int(logits[2].argmax())}))
    assert [record.take(row) for row in logits] == [True, True, False]
    made = record.generation()
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    assert made.tokens == tuple(logits.argmax(axis=1)) and made.ended and made.finite
    assert made.entropies == pytest.approx(-(p * np.log(p)).sum(axis=1))
    assert made.surprises == pytest.approx(-np.log(p.max(axis=1)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_record_stops_where_logits_are_not_finite(value):
    record = GreedyRecord(8, frozenset())
    assert record.take(np.array([0.0, 1.0], np.float32))
    assert not record.take(np.array([0.0, value], np.float32))
    made = record.generation()
    assert made.tokens == (1,) and not made.finite and not made.ended


def test_generations_survive_json():
    made = generation(ended=True)
    assert Generation.from_dict(made.to_dict()) == made
