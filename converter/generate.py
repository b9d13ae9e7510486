"""Generation from an artifact by llama.cpp, in a process of its own: what it cannot recover from ends that process.

The child reads one JSON object on stdin and writes one line of JSON for what it is and one for each generation.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from calibration.control import Interrupted, Progress, ShouldStop
from calibration.generation import Generation, GreedyRecord
from converter.llama_cpp import LlamaCpp, installed

_UNAVAILABLE = 4  # the child's exit code when there is no llama.cpp that it could use


class RuntimeUnavailable(Exception):
    """There is no llama.cpp here, or one that cannot be called: says nothing about the artifact."""


class RuntimeFailed(Exception):
    """llama.cpp does not load the artifact, or does not survive running it."""


@dataclass(frozen=True)
class Generated:
    """generations: one a prompt. end_tokens: what ended them. tokenized: what llama.cpp makes of the texts it was
    asked about. runtime: which llama.cpp it was."""

    generations: list[Generation]
    end_tokens: frozenset[int]
    tokenized: list[list[int]]
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
    texts: Sequence[str],
    threads: int,
    progress: Progress,
    should_stop: ShouldStop,
) -> Generated:
    """Continue each prompt (tokens, not empty) by up to n_tokens, and tokenize the texts.

    Raises RuntimeUnavailable, RuntimeFailed, and Interrupted when should_stop, polled after every prompt, says so.
    """
    if not installed():
        raise RuntimeUnavailable("xllamacpp is not installed: pip install 'bitwright[llama-cpp]'")
    request = {
        "artifact": str(artifact),
        "prompts": [list(prompt) for prompt in prompts],
        "n_tokens": n_tokens,
        "texts": list(texts),
        "threads": threads,
    }
    root = str(Path(__file__).parent.parent)
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "converter.generate"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # A Ctrl-C is ours to answer.
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(":")},
        )
        assert child.stdin is not None and child.stdout is not None
        lines: list[dict[str, Any]] = []
        try:
            try:
                with child.stdin as stdin:
                    stdin.write(json.dumps(request).encode())
            except BrokenPipeError:
                pass  # it has ended already; its exit code says why
            for line in child.stdout:
                if not line.startswith(b"{"):
                    continue  # a library's own chatter
                lines.append(json.loads(line))
                progress("generate", len(lines) - 1, len(prompts), "prompts")
                if should_stop():
                    raise Interrupted("stopped while llama.cpp generated")
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if code == _UNAVAILABLE:
        raise RuntimeUnavailable(said[-1])
    if code or len(lines) != len(prompts) + 1:
        killed = [f"llama.cpp was ended by {signal.Signals(-code).name}"] if code < 0 else []
        raise RuntimeFailed(": ".join([*killed, *said[-1:]]) or f"llama.cpp failed ({code})")
    return Generated(
        [Generation.from_dict(line) for line in lines[1:]],
        frozenset(lines[0]["end_tokens"]),
        lines[0]["tokenized"],
        lines[0]["runtime"],
    )


def _serve() -> None:
    """What the child does. Every thread takes whole prompts: the result depends on no number of threads, and no core
    waits for another inside of an operation."""
    request = json.load(sys.stdin)
    prompts, n_tokens = request["prompts"], request["n_tokens"]
    n_ctx = max(map(len, prompts)) + n_tokens
    try:
        model = LlamaCpp(request["artifact"], n_ctx=n_ctx, n_threads=1)
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(_UNAVAILABLE)
    except ValueError as error:
        print("; ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(1)
    with model, ExitStack() as stack, ThreadPoolExecutor(request["threads"]) as pool:
        tokenized = [model.tokenize(text) for text in request["texts"]]
        runtime = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        _write({"end_tokens": sorted(model.end_tokens), "tokenized": tokenized, "runtime": runtime})
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
            _write(generation)


def _write(data: dict[str, Any]) -> None:
    print(json.dumps(data), flush=True)


if __name__ == "__main__":
    _serve()
