"""The command `bitwright check`: whether a runtime loads a directory and writes with it, in a Python of its own.

vLLM wants other versions of much that this project stands on, so it lives in another environment, whose Python runs
program.py there. The request is one JSON object on the program's stdin, the answer one line in a file of its own,
as libraries print on stdout.
"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bitwright.formats.errors import ConvertError

Engine = Literal["vllm", "transformers"]

_NAMES: Mapping[Engine, str] = {"vllm": "vLLM", "transformers": "transformers"}
_PACKAGES: Mapping[Engine, str] = {"vllm": "vllm", "transformers": "transformers compressed-tensors"}
PROMPT = "The capital of France is"
_SAID_CHARACTERS = 600
# vLLM's workers print why they end; what is raised points there alone.
_ELSEWHERE = "root cause"
_CAUSE = re.compile(r"\b[\w.]*(?:Error|Exception): .+")


@dataclass(frozen=True)
class Loaded:
    """runtime: name and version. text: what follows the prompt, each token the most probable one; n_tokens: of them.
    perplexity: of the tokens that were given, None where there were none."""

    runtime: str
    prompt: str
    text: str
    n_tokens: int
    perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_in_engine(
    directory: Path,
    engine: Engine,
    python: Path | None = None,
    prompt: str = PROMPT,
    n_tokens: int = 24,
    tensor_parallel: int = 1,
    tokens: Sequence[Sequence[int]] = (),
) -> Loaded:
    """Load the directory and continue the prompt by up to n_tokens.

    python: the interpreter that has the engine; None for the one that runs this. tensor_parallel: how many GPUs vLLM
    cuts it over. tokens: sequences of one length, whose second halves vLLM scores.
    Raises ConvertError for what is no directory of a model, for a Python without the engine, and for a directory that
    does not load, writes nothing, or predicts what is no number.
    """
    name = _NAMES[engine]
    if not (directory / "config.json").is_file():
        raise ConvertError(
            f"{name} loads directories with a config.json, and that is none",
            str(directory),
            "name a directory that a profile for vLLM has made; a GGUF is judged by `bitwright evaluate`",
        )
    request = {
        "engine": engine,
        "directory": str(directory.absolute()),
        "prompt": prompt,
        "n_tokens": n_tokens,
        "tensor_parallel": tensor_parallel,
        "tokens": [list(map(int, ids)) for ids in tokens],
    }
    answer = _ask(python or Path(sys.executable), request)
    if "missing" in answer:
        raise ConvertError(
            f"{name} is not installed there: the Python has no module {answer['missing']!r}",
            str(python or sys.executable),
            f"install it in an environment of its own (pip install {_PACKAGES[engine]}), and name that one's Python:"
            " --python ENVIRONMENT/bin/python",
        )
    if "error" in answer:
        said = " ".join(answer["error"].split())
        raise ConvertError(f"{name} does not run it: {said[:_SAID_CHARACTERS]}", str(directory), _REMEDY)
    chosen = answer["log_probabilities"]
    if not all(map(math.isfinite, chosen)):
        raise ConvertError(f"{answer['runtime']} loads it, and predicts what is no number", str(directory), _REMEDY)
    if not chosen:
        raise ConvertError(f"{answer['runtime']} loads it, and writes nothing", str(directory), _REMEDY)
    return Loaded(answer["runtime"], prompt, answer["text"], len(chosen), answer.get("perplexity"))


_REMEDY = "hold its tensors against the source with `bitwright verify`, or convert again with another scheme"


def _ask(python: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """The program's answer; what it said last, as an error, where it ends without one."""
    program = Path(__file__).with_name("program.py")
    with tempfile.TemporaryFile("w+") as answers:
        try:
            child = subprocess.Popen(
                [str(python), str(program), str(answers.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                pass_fds=[answers.fileno()],
                start_new_session=True,  # with its workers, which end with it
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        except OSError as error:
            raise ConvertError(
                f"that is no Python: {error.strerror}", str(python), "name an interpreter with --python"
            ) from error
        try:
            said, _ = child.communicate(json.dumps(request))
        finally:
            _end(child)
        answers.seek(0)
        answer = answers.readline()
    if not answer:
        last = said.strip().splitlines()[-1:] or [f"it ended with {child.returncode}"]
        return {"error": last[0]}
    data: dict[str, Any] = json.loads(answer)
    if _ELSEWHERE in data.get("error", ""):
        causes = [cause for cause in _CAUSE.findall(said) if _ELSEWHERE not in cause]
        data["error"] = causes[-1] if causes else data["error"]
    return data


def _end(child: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
