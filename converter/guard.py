"""The coherence guard: what the artifact really writes, beside what the source writes.

llama.cpp generates greedily from the artifact, on fixed prompts and on beginnings of held-out text; without llama.cpp
the model itself does, with the decoded weights. The source reads all of it in one pass through its layers, which tells
where it would first have gone another way, and answers the fixed prompts itself.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibration.chat_template import ChatTemplate, TemplateFailed
from calibration.coherence import problems
from calibration.control import ShouldStop
from calibration.corpus import load_corpus
from calibration.generation import Generation, Reading, generate_greedily, read_continuations
from converter.calibrate import load_tokenizer, runnable
from converter.checkpoint import Checkpoint
from converter.child import RuntimeFailed, RuntimeUnavailable
from converter.end_of_generation import source_end_tokens
from converter.generate import Generated, generate_by_llama_cpp
from converter.kept import is_kept
from converter.progress import Progress
from converter.target import Candidate
from formats.files import make_directory, remove_tree
from formats.seals import write_sealed
from profiles.vocabulary import ModelMap

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
N_TOKENS = 32
# Beginnings of held-out text: so many, each of so many tokens, so far apart.
HELD_OUT_PROMPTS, HELD_OUT_TOKENS, _HELD_OUT_APART = 32, 32, 256
# Of the fixed prompts: from so many on that have a problem the model is damaged, or lost.
_SEVERE_PROMPTS, _FAILED_PROMPTS = 2, 6
_DAY = "01 Jan 2026"  # for the templates that ask what day it is


def guard(
    checkpoint: Checkpoint,
    model_map: ModelMap,
    candidate: Candidate,
    work_dir: Path,
    *,
    held_out: str | None,
    seed: int,
    device: str,
    threads: int,
    progress: Progress,
    should_stop: ShouldStop,
) -> dict[str, Any]:
    """What the artifact generates, what is wrong with it, and how much of it the source would have written.

    held_out: name of the corpus that the held-out prompts begin, see calibration.corpus. Measured once: the result
    stays in the work directory, and so does each finished part of it until then. Raises Interrupted, and
    RuntimeTroubled when the system keeps ending llama.cpp.
    """
    result = work_dir / "coherence.json"
    if not is_kept(result, "coherence report", progress):
        checkpoint, model_map = runnable(checkpoint, model_map, work_dir)
        tokenizer = load_tokenizer(checkpoint.location)
        parts = work_dir / "guard"
        options: dict[str, Any] = {
            "device": device,
            "threads": threads,
            "progress": progress,
            "should_stop": should_stop,
        }
        asked, template_note = prompt_tokens(tokenizer, PROMPTS)
        if template_note:
            progress.say(template_note)
        samples = load_corpus(held_out, tokenizer, HELD_OUT_PROMPTS, _HELD_OUT_APART, seed, split="test")
        prompts = [*asked, *samples.tokens[:, :HELD_OUT_TOKENS].tolist()]
        generated, note = _generate(checkpoint, candidate, prompts, parts, options)
        continuations = [generation.tokens for generation in generated.generations]
        texts = list(zip(prompts, continuations, strict=True))
        readings = read_continuations(checkpoint, checkpoint.location, texts, work_dir=parts / "read", **options)
        own = generate_greedily(
            checkpoint,
            checkpoint.location,
            asked,
            N_TOKENS,
            generated.end_tokens,
            work_dir=parts / "source",
            **options,
        )
        found = _judged(tokenizer, generated, readings, own, note) | {"held_out_text": samples.name}
        write_sealed(result, "coherence report", json.dumps(found, indent=1).encode())
    remove_tree(work_dir / "guard")
    return json.loads(result.read_bytes())


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
    if not getattr(tokenizer, "chat_template", None):
        return None, ""
    try:
        with ChatTemplate(tokenizer) as template:
            questions = [[{"role": "user", "content": prompt}] for prompt in prompts]
            return [template.render(q, add_generation_prompt=True, date_string=_DAY) for q in questions], ""
    except TemplateFailed as error:
        return None, f"the chat template takes no plain question ({error}): the guard's prompts are asked without it"


def _generate(
    checkpoint: Checkpoint,
    candidate: Candidate,
    prompts: Sequence[Sequence[int]],
    parts: Path,
    options: dict[str, Any],
) -> tuple[Generated, dict[str, str]]:
    """What the artifact generates, and what there is to say about the runtime: why it is not llama.cpp, or how
    llama.cpp failed."""
    kept = parts / "generated.json"
    if not is_kept(kept, "generated text", options["progress"]):
        make_directory(parts)
        note = {}
        try:
            if candidate.gguf is None:
                raise RuntimeUnavailable("the artifact is no GGUF")
            generated = generate_by_llama_cpp(
                candidate.gguf,
                prompts,
                N_TOKENS,
                threads=options["threads"],
                progress=options["progress"],
                should_stop=options["should_stop"],
            )
        except (RuntimeUnavailable, RuntimeFailed) as error:
            note = {"failed" if isinstance(error, RuntimeFailed) else "unavailable": str(error)}
            ends = source_end_tokens(checkpoint.location)
            generations = generate_greedily(
                candidate.weights,
                checkpoint.location,
                prompts,
                N_TOKENS,
                ends,
                work_dir=parts / "artifact",
                arithmetic=candidate.arithmetic,
                **options,
            )
            how = "with the decoded weights" if candidate.arithmetic is None else "with the products of the schemes"
            generated = Generated(generations, ends, f"transformers, {how}")
        write_sealed(kept, "generated text", json.dumps([generated.to_dict(), note]).encode())
    data, note = json.loads(kept.read_bytes())
    return Generated.from_dict(data), note


def _judged(
    tokenizer: Any, generated: Generated, readings: list[Reading], own: list[Generation], note: dict[str, str]
) -> dict[str, Any]:
    rows = []
    for prompt, generation, reading, answer in zip(PROMPTS, generated.generations, readings, own, strict=False):
        text, own_text = (tokenizer.decode(g.tokens, skip_special_tokens=True) for g in (generation, answer))
        found = problems(generation, reading, answer, text, own_text)
        rows.append(
            {
                "prompt": prompt,
                "text": text,
                "agreed_text": tokenizer.decode(generation.tokens[: reading.agreed], skip_special_tokens=True),
                "source_text": own_text,
                "tokens": len(generation.tokens),
                "agreed": reading.agreed,
                "entropy": _mean(generation.entropies),
                "source_entropy": _mean(answer.entropies),
                "surprise": _mean(reading.surprises),
                "source_surprise": _mean(answer.surprises),
                "problems": [problem.__dict__ for problem in found],
            }
        )
    held_out = list(zip(generated.generations, readings, strict=True))[len(PROMPTS) :]
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
        "greedy_tokens": N_TOKENS,
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
