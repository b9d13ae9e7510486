"""What the true runtime makes of an artifact, in a process of its own: how it cuts text into tokens, which tokens it
ends at, and the logits of one sample. The runtime of a GGUF is llama.cpp, that of a directory transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.calibration.control import ShouldStop
from bitwright.converter.judge.child import Runtime, answer, check_installed, converse, serve
from bitwright.converter.judge.llama_cpp import LlamaCpp, patience, version_text


@dataclass(frozen=True)
class Text:
    """A text to cut. special: whether the tokens that begin and end a text are added."""

    text: str
    special: bool = True


@dataclass(frozen=True)
class Probe:
    """runtime: its name and version. tokenized: the ids of each text. end_tokens: where it ends a generation.
    logits: float32 [n_last, vocabulary], memory-mapped; None where none were asked for."""

    runtime: str
    tokenized: list[list[int]]
    end_tokens: frozenset[int]
    logits: np.ndarray | None


def probe(
    runtime: Runtime,
    artifact: Path,
    texts: Sequence[Text],
    sample: Sequence[int],
    n_last: int,
    *,
    scratch: Path,
    threads: int,
    should_stop: ShouldStop,
) -> Probe:
    """Ask the runtime about the artifact: a GGUF's first file, or a directory.

    sample: token ids, whose last n_last logits are computed; none for no logits. scratch: a file for them, which the
    caller deletes. Raises RuntimeUnavailable, RuntimeFailed, RuntimeTroubled and Interrupted, see child.converse.
    """
    check_installed(runtime)
    request = {
        "runtime": runtime,
        "artifact": str(artifact),
        "texts": [[text.text, text.special] for text in texts],
        "sample": list(sample),
        "n_last": n_last,
        "scratch": str(scratch),
        "threads": threads,
    }
    first, *_ = converse(
        "bitwright.converter.judge.probe",
        request,
        2 if sample else 1,
        name=runtime,
        patience=patience(artifact, len(sample) + 1),
        should_stop=should_stop,
    )
    logits = np.load(scratch, mmap_mode="r") if sample else None
    return Probe(first["runtime"], first["tokenized"], frozenset(first["end_tokens"]), logits)


def _respond(request: dict[str, Any]) -> None:
    """What the child does."""
    {"llama.cpp": _respond_by_llama_cpp, "transformers": _respond_by_transformers}[request["runtime"]](request)


def _respond_by_llama_cpp(request: dict[str, Any]) -> None:
    with LlamaCpp(request["artifact"], vocab_only=True) as vocabulary:
        tokenized = [vocabulary.tokenize(text, add_special=special) for text, special in request["texts"]]
        ends = sorted(vocabulary.end_tokens)
    answer({"runtime": version_text(), "tokenized": tokenized, "end_tokens": ends})
    if sample := request["sample"]:
        with LlamaCpp(request["artifact"], n_ctx=len(sample), n_threads=request["threads"]) as model:
            _keep(request, model.logits(sample, request["n_last"]))


def _respond_by_transformers(request: dict[str, Any]) -> None:
    import torch
    import transformers

    torch.set_num_threads(request["threads"])
    directory = request["artifact"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    tokenized = [tokenizer(text, add_special_tokens=special)["input_ids"] for text, special in request["texts"]]
    try:
        generation = transformers.GenerationConfig.from_pretrained(directory)
    except OSError:  # a base model may go without the file
        generation = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(directory))
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
    runtime = f"transformers {transformers.__version__}"
    answer({"runtime": runtime, "tokenized": tokenized, "end_tokens": ends})
    if sample := request["sample"]:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False)
        with torch.inference_mode():
            logits = model.eval()(torch.tensor([sample]), logits_to_keep=request["n_last"]).logits[0]
        _keep(request, logits.float().numpy())


def _keep(request: dict[str, Any], logits: np.ndarray) -> None:
    with open(request["scratch"], "wb") as file:
        np.save(file, logits)
    answer({"logits": list(logits.shape)})


if __name__ == "__main__":
    serve(_respond)
