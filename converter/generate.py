"""Generation from a GGUF by llama.cpp, in a process of its own."""

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from calibration.control import Progress, ShouldStop
from calibration.generation import Generation, GreedyRecord
from converter.child import RuntimeUnavailable, answer, converse, quit_failed, quit_unavailable
from converter.llama_cpp import LlamaCpp, installed, patience, version_text


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
    progress: Progress,
    should_stop: ShouldStop,
) -> Generated:
    """Continue each prompt (tokens, not empty) by up to n_tokens.

    Raises RuntimeUnavailable, RuntimeFailed, RuntimeTroubled and Interrupted, see child.converse.
    """
    if not installed():
        raise RuntimeUnavailable("xllamacpp is not installed: pip install 'bitwright[llama-cpp]'")
    request = {
        "artifact": str(artifact),
        "prompts": [list(prompt) for prompt in prompts],
        "n_tokens": n_tokens,
        "threads": threads,
    }
    first, *generations = converse(
        "converter.generate",
        request,
        len(prompts) + 1,
        name="llama.cpp",
        patience=patience(artifact, max(map(len, prompts)) + n_tokens),
        should_stop=should_stop,
        seen=lambda n: progress("generate", n - 1, len(prompts), "prompts"),
    )
    return Generated(list(map(Generation.from_dict, generations)), frozenset(first["end_tokens"]), first["runtime"])


def _serve() -> None:
    """What the child does. Every thread takes whole prompts: the result depends on no number of threads, and no core
    waits for another inside of an operation."""
    request = json.load(sys.stdin)
    prompts, n_tokens = request["prompts"], request["n_tokens"]
    n_ctx = max(map(len, prompts)) + n_tokens
    try:
        model = LlamaCpp(request["artifact"], n_ctx=n_ctx, n_threads=1)
    except ImportError as error:
        quit_unavailable(error)
    except (ValueError, OSError, MemoryError) as error:
        quit_failed(error)
    with model, ExitStack() as stack, ThreadPoolExecutor(request["threads"]) as pool:
        answer({"end_tokens": sorted(model.end_tokens), "runtime": version_text()})
        free: SimpleQueue[LlamaCpp] = SimpleQueue()
        for _ in range(min(request["threads"], len(prompts))):
            free.put(stack.enter_context(model.sibling()))

        def generate(prompt: list[int]) -> dict[str, Any]:
            context = free.get()
            record = GreedyRecord(n_tokens, model.end_tokens)
            context.generate(prompt, n_tokens, record.take)
            free.put(context)
            return record.generation().to_dict()

        for generation in pool.map(generate, prompts):
            answer(generation)


if __name__ == "__main__":
    _serve()
