"""Generation from a GGUF by llama.cpp, in a process of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.calibration.control import OnProgress, ShouldStop
from bitwright.calibration.evaluation.generation import Generation, GreedyRecord
from bitwright.converter.judge.child import answer, check_installed, converse, serve, tell
from bitwright.converter.judge.llama_cpp import LlamaCpp, patience, version_text

# The attention caches of all prompts that go side by side take no more than the weights do, and this at least.
_LEAST_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Generated:
    """generations: one a prompt. end_tokens: what ended them. runtime: which llama.cpp it was."""

    generations: list[Generation]
    end_tokens: frozenset[int]
    runtime: str

    def to_dict(self) -> dict[str, Any]:
        generations = [generation.to_dict() for generation in self.generations]
        return {**self.__dict__, "generations": generations, "end_tokens": sorted(self.end_tokens)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Generated":
        generations = [Generation.from_dict(generation) for generation in data["generations"]]
        return cls(**{**data, "generations": generations, "end_tokens": frozenset(data["end_tokens"])})


def generate_by_llama_cpp(
    artifact: Path,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    threads: int,
    progress: OnProgress,
    should_stop: ShouldStop,
) -> Generated:
    """Continue each prompt (tokens, not empty) by up to n_tokens.

    Raises RuntimeUnavailable, RuntimeFailed, RuntimeTroubled and Interrupted, see child.converse.
    """
    check_installed("llama.cpp")
    request = {
        "artifact": str(artifact),
        "prompts": [list(prompt) for prompt in prompts],
        "n_tokens": n_tokens,
        "threads": threads,
    }
    first, *generations = converse(
        "bitwright.converter.judge.generate",
        request,
        len(prompts) + 1,
        name="llama.cpp",
        patience=patience(artifact, sum(map(len, prompts))),  # the longest step is the first
        should_stop=should_stop,
        told=lambda done, total: progress("generate", done, total, "tokens"),
    )
    return Generated(list(map(Generation.from_dict, generations)), frozenset(first["end_tokens"]), first["runtime"])


def _respond(request: dict[str, Any]) -> None:
    """What the child does. Which prompts go side by side depends on them and on the file alone, so that the result
    does not depend on the number of threads."""
    prompts, n_tokens = request["prompts"], request["n_tokens"]
    with LlamaCpp(request["artifact"], n_ctx=max(map(len, prompts)) + n_tokens, n_threads=1) as model:
        answer({"end_tokens": sorted(model.end_tokens), "runtime": version_text()})
        records = [GreedyRecord(n_tokens, model.end_tokens) for _ in prompts]
        step = n_together(model.cache_bytes(), len(prompts), Path(request["artifact"]).stat().st_size)
        with model.sibling(request["threads"], step) as context:
            for start in range(0, len(prompts), step):
                _generate_together(context, prompts, records, range(len(prompts))[start : start + step])
    for record in records:
        answer(record.generation().to_dict())


def n_together(cache_bytes: int, n_prompts: int, artifact_bytes: int) -> int:
    """How many of the prompts go side by side, each with a cache of so many bytes."""
    return min(n_prompts, max(1, max(_LEAST_CACHE_BYTES, artifact_bytes) // cache_bytes))


def _generate_together(
    context: LlamaCpp, prompts: Sequence[Sequence[int]], records: Sequence[GreedyRecord], together: range
) -> None:
    """Of these prompts of all, into their records."""
    n_tokens = records[0].n_tokens

    def begin_step(step: int) -> None:
        tell(together.start * n_tokens + step * len(together), len(prompts) * n_tokens)

    context.generate_together(
        [prompts[i] for i in together], n_tokens, lambda i, logits: records[together[i]].take(logits), begin_step
    )


if __name__ == "__main__":
    serve(_respond)
