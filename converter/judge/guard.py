"""The coherence guard: what the artifact really writes, beside what the source writes.

llama.cpp generates greedily from the artifact, on fixed prompts and on beginnings of held-out text; without llama.cpp
the model itself does, with the decoded weights. The source reads all of it in one pass through its layers, which tells
where it would first have gone another way, and answers the fixed prompts itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bitwright.calibration.control import PassControl
from bitwright.calibration.evaluation.coherence import problems
from bitwright.calibration.evaluation.generation import (
    SETTLED_TOKENS,
    Generation,
    Reading,
    generate_greedily,
    stream_readings,
)
from bitwright.calibration.text.chat_template import ChatTemplate, TemplateFailed
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.job.kept import kept_json
from bitwright.converter.judge.child import RuntimeFailed, RuntimeUnavailable
from bitwright.converter.judge.generate import Generated, generate_by_llama_cpp
from bitwright.converter.judge.judging import Judging
from bitwright.converter.tokenizer.end_of_generation import source_end_tokens
from bitwright.formats.files.disk import make_directory

# One kind of task each, none of which a language model of any size answers with a loop.
PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short story that begins with: The old lighthouse had been dark for years.",
    "List the planets of the solar system in order from the sun.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train travels 60 kilometres in 45 minutes. What is its average speed in kilometres per hour?",
    "Translate into French: The library opens at nine o'clock in the morning.",
    "What should one consider before adopting a dog?",
    "Summarize in one sentence: Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
)
N_TOKENS, FEWEST_TOKENS = 32, 16
# Of the questions the first so many, and of the beginnings, where the judgement is to be fast.
FAST_PROMPTS, FAST_HELD_OUT = 4, 4
# Beginnings of held-out text: so many, each of so many tokens, so far apart.
HELD_OUT_PROMPTS, HELD_OUT_TOKENS, _HELD_OUT_APART = 32, 32, 256
FEWEST_HELD_OUT = 4
# What all texts may take, in weights times tokens: as much as the whole guard of a model of 9 billion weights.
MOST_PRODUCTS = 2.5e13
# Of the fixed prompts: from so many on that have a problem the model is damaged, or lost.
_SEVERE_PROMPTS, _FAILED_PROMPTS = 2, 6
_DAY = "01 Jan 2026"  # for the templates that ask what day it is


@dataclass(frozen=True)
class Extent:
    """How much is generated: from so many held-out beginnings, and so many tokens of each text at most."""

    held_out: int
    n_tokens: int

    @classmethod
    def of_model(cls, n_weights: int, asked_tokens: int) -> "Extent":
        """What fits MOST_PRODUCTS, and what says something at least. asked_tokens: of the fixed prompts together."""
        for n_tokens in (N_TOKENS, FEWEST_TOKENS):
            left = MOST_PRODUCTS / n_weights - asked_tokens - len(PROMPTS) * n_tokens
            held_out = min(HELD_OUT_PROMPTS, int(left // (HELD_OUT_TOKENS + n_tokens)))
            if held_out >= FEWEST_HELD_OUT:
                return cls(held_out, n_tokens)
        return cls(min(HELD_OUT_PROMPTS, FEWEST_HELD_OUT), FEWEST_TOKENS)

    @property
    def note(self) -> dict[str, str]:
        """What there is to say about it: nothing where it is whole."""
        if self == Extent(HELD_OUT_PROMPTS, N_TOKENS):
            return {}
        return {"shortened": f"{self.held_out} held-out texts and {self.n_tokens} tokens each, as the model is large"}


def streamed_coherence(judging: Judging, candidate: Candidate, held_out: str | None) -> dict[str, Any]:
    """What the artifact generates, what is wrong with it, and how much of it the source would have written.

    held_out: name of the corpus that the held-out prompts begin, see calibration.text.corpus. Measured once: the result
    stays in the work directory, and so does each finished part of it until then. Raises Interrupted, and
    RuntimeTroubled when the system keeps ending llama.cpp.
    """
    parts = judging.work_dir / "guard"

    fast = judging.judge == "fast"
    questions, n_held_out = (PROMPTS[:FAST_PROMPTS], FAST_HELD_OUT) if fast else (PROMPTS, HELD_OUT_PROMPTS)

    def is_enough(kept: dict[str, Any]) -> bool:
        return len(kept["prompts"]) >= len(questions)

    def compute() -> dict[str, Any]:
        asked, template_note = prompt_tokens(judging.tokenizer, questions)
        if template_note:
            judging.progress.say(template_note)
        n_weights = sum(tensor.n_weights for tensor in judging.model_map.tensors)
        extent = Extent.of_model(n_weights, sum(map(len, asked)))
        corpus = judging.held_out(held_out, min(n_held_out, extent.held_out), _HELD_OUT_APART)
        prompts = [*asked, *corpus.tokens[:, :HELD_OUT_TOKENS].tolist()]
        generated, note = _generate(judging, candidate, prompts, extent.n_tokens, parts)
        continuations = [generation.tokens for generation in generated.generations]
        texts = list(zip(prompts, continuations, strict=True))
        control = judging.control("guard")
        readings = stream_readings(judging.source_model, texts, control.within("read"))
        answers = _answers(judging, asked, extent.n_tokens, generated.end_tokens, control.within("source"))
        if any(answer.finite and not answer.ended and len(answer.tokens) < extent.n_tokens for answer in answers):
            note |= {
                "source": f"the source is streamed to answer, and {SETTLED_TOKENS} tokens of its answers are enough"
            }
        coherence = _coherence(judging.tokenizer, generated, readings, answers, extent.note | note)
        return coherence | {"greedy_tokens": extent.n_tokens, "held_out_text": corpus.name}

    path = judging.work_dir / "coherence.json"
    return kept_json(path, "coherence report", judging.progress, compute, parts, is_enough)


def _answers(
    judging: Judging, asked: list[list[int]], n_tokens: int, end_tokens: frozenset[int], control: PassControl
) -> list[Generation]:
    """The source's own, to the fixed prompts."""

    def generate() -> list[dict[str, Any]]:
        made = generate_greedily(judging.source_model, asked, n_tokens, end_tokens, control)
        return [generation.to_dict() for generation in made]

    cached = judging.cache.entry("answers", prompts=asked, n_tokens=n_tokens, end_tokens=sorted(end_tokens))
    return list(map(Generation.from_dict, cached.json_result(generate)))


def prompt_tokens(tokenizer: Any, prompts: Sequence[str]) -> tuple[list[list[int]], str]:
    """The prompts as the model is used to get them: in its chat template, if it has one that takes a plain question;
    and why they are not, "" where there is nothing to say."""
    texts, note = chat_texts(tokenizer, prompts)
    if texts is None:  # the bare question is as good a beginning
        return [tokenizer(prompt)["input_ids"] for prompt in prompts], note
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], note


def chat_texts(tokenizer: Any, prompts: Sequence[str]) -> tuple[list[str] | None, str]:
    """The questions as the chat template renders them, up to where the answer begins; None without a template, or with
    one that wants something else. And what there is to say about that, "" for nothing."""
    template = getattr(tokenizer, "chat_template", None)
    return _rendered(tokenizer, str(template), tuple(prompts)) if template else (None, "")


@lru_cache(maxsize=4)
def _rendered(tokenizer: Any, _template: str, prompts: tuple[str, ...]) -> tuple[list[str] | None, str]:
    try:
        with ChatTemplate(tokenizer) as template:
            questions = [[{"role": "user", "content": prompt}] for prompt in prompts]
            return [template.render(q, add_generation_prompt=True, date_string=_DAY) for q in questions], ""
    except TemplateFailed as error:
        return None, f"the chat template takes no plain question ({error}): the guard's prompts are asked without it"


def _generate(
    judging: Judging, candidate: Candidate, prompts: Sequence[Sequence[int]], n_tokens: int, parts: Path
) -> tuple[Generated, dict[str, str]]:
    """What the artifact generates, and what there is to say about the runtime: why it is not llama.cpp, or how
    llama.cpp failed. parts: the directory where that stays."""

    def compute() -> dict[str, Any]:
        make_directory(parts)
        try:
            if candidate.gguf is None:
                raise RuntimeUnavailable("the artifact is no GGUF")
            generated = generate_by_llama_cpp(
                candidate.gguf,
                prompts,
                n_tokens,
                threads=judging.threads,
                progress=judging.progress,
                should_stop=judging.should_stop,
            )
            return {"generated": generated.to_dict(), "note": {}}
        except (RuntimeUnavailable, RuntimeFailed) as error:
            note = {"failed" if isinstance(error, RuntimeFailed) else "unavailable": str(error)}
            return {"generated": _generate_by_stream(judging, candidate, prompts, n_tokens).to_dict(), "note": note}

    def answers(kept: dict[str, Any]) -> bool:
        return len(kept["generated"]["generations"]) == len(prompts)

    data = kept_json(parts / "generated.json", "generated text", judging.progress, compute, answers=answers)
    return Generated.from_dict(data["generated"]), data["note"]


def _generate_by_stream(
    judging: Judging, candidate: Candidate, prompts: Sequence[Sequence[int]], n_tokens: int
) -> Generated:
    running, _ = judging.running
    ends = source_end_tokens(running.location)
    control = judging.control("guard").within("artifact")
    generations = generate_greedily(judging.candidate_model(candidate), prompts, n_tokens, ends, control)
    how = "with the decoded weights" if candidate.arithmetic is None else "with the products of the schemes"
    return Generated(generations, ends, f"transformers, {how}")


def _coherence(
    tokenizer: Any, generated: Generated, readings: list[Reading], answers: list[Generation], note: dict[str, str]
) -> dict[str, Any]:
    """answers: the source's own, to the fixed prompts."""
    rows = []
    for prompt, generation, reading, answer in zip(PROMPTS, generated.generations, readings, answers, strict=False):
        text, source_text = (tokenizer.decode(g.tokens, skip_special_tokens=True) for g in (generation, answer))
        rows.append(
            {
                "prompt": prompt,
                "text": text,
                "agreed_text": tokenizer.decode(generation.tokens[: reading.agreed], skip_special_tokens=True),
                "source_text": source_text,
                "tokens": len(generation.tokens),
                "agreed": reading.agreed,
                "entropy": _mean(generation.entropies),
                "source_entropy": _mean(answer.entropies),
                "surprise": _mean(reading.surprises),
                "source_surprise": _mean(answer.surprises),
                "problems": [p.__dict__ for p in problems(generation, reading, answer, text, source_text)],
            }
        )
    held_out = list(zip(generated.generations, readings, strict=True))[len(answers) :]
    equal = [g.finite and r.agreed == len(g.tokens) for g, r in held_out]
    not_finite = sum(not g.finite for g, _ in held_out)
    return {
        "verdict": verdict(rows, note, not_finite),
        "runtime": generated.runtime,
        "runtime_note": note,
        "prompts": rows,
        "greedy_agreement": sum(equal) / len(equal),
        "greedy_common_prefix": sum(r.agreed for _, r in held_out) / len(held_out),
        "greedy_prompts": len(held_out),
        "held_out_not_finite": not_finite,
    }


def verdict(rows: list[dict[str, Any]], note: dict[str, str], not_finite: int) -> str:
    """ "coherent", "noticeable" (one prompt has a problem), "severe", or "failed": the model writes no text any more.

    A runtime that the artifact breaks, and predictions that are not finite, to a prompt or of `not_finite` held-out
    texts, are severe whatever is written.
    """
    kinds = [{problem["kind"] for problem in row["problems"]} for row in rows]
    troubled = sum(map(bool, kinds))
    if troubled >= _FAILED_PROMPTS:
        return "failed"
    overflows = not_finite or any("not finite" in k for k in kinds)
    if troubled >= _SEVERE_PROMPTS or overflows or "failed" in note:
        return "severe"
    return "noticeable" if troubled else "coherent"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
