"""Chat templates, rendered by transformers in a process of its own: a template is a program that came with the model.

transformers' sandbox keeps it from this machine's files, and nothing keeps it from counting to 10**12 or from asking
for a text of 2 GB. The child has so many seconds of computing for each conversation and so much memory; one that takes
more is ended by the system. It reads one JSON object a line on stdin, the template and the names of special tokens
first, and answers each conversation with one line.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from bitwright.calibration.child import start_child

_SECONDS = 5.0  # of computing, for one conversation
_BYTES = 512 << 20  # beside what the interpreter and transformers take
_LONGEST_TEXT = 16 << 20  # characters


class TemplateFailed(Exception):
    """Why a conversation cannot be rendered, in one line."""


class ChatTemplate:
    """A tokenizer's template. A context: leaving it ends the child, which the first rendering has started."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._child: _Child | None = None

    def __enter__(self) -> "ChatTemplate":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None

    def render(self, conversation: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """What tokenizer.apply_chat_template(conversation, tokenize=False, **variables) gives.

        Raises TemplateFailed for a template that is absent, raises an error, or takes too much.
        """
        if self._child is None:
            self._child = self._start()
        try:
            self._child.stdin.write(_line({"conversation": list(conversation), "variables": variables}))
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            child, self._child = self._child, None
            raise TemplateFailed(_why_ended(child.end()))
        told: dict[str, str] = json.loads(answer)
        if "error" in told:
            raise TemplateFailed(told["error"])
        return told["text"]

    def _start(self) -> "_Child":
        try:
            template = self._tokenizer.get_chat_template()
            tokens = self._tokenizer.special_tokens_map
            first = _line({"template": template, "tokens": tokens, "seconds": _SECONDS})
        except (ValueError, TypeError) as error:
            raise TemplateFailed(str(error).splitlines()[0]) from None
        child = _Child()
        child.stdin.write(first)
        return child


class _Child:
    """The process that renders, and its pipes."""

    def __init__(self) -> None:
        self._process = start_child("bitwright.calibration.text.chat_template")
        self.stdin, self.stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)

    def end(self) -> int:
        """The exit code of the process, which may have ended already."""
        with suppress(BrokenPipeError):
            self.stdin.close()
        try:
            return self._process.wait(timeout=5)  # it ends with its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            self.stdout.close()


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"


def _why_ended(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"it takes more than {_SECONDS:g} seconds of computing"
    return f"rendering ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def _serve() -> None:
    """What the child does."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library's own chatter is no answer
    import transformers.utils.chat_template_utils  # noqa: F401  # its memory is not the template's

    requests = sys.stdin.buffer
    given = json.loads(requests.readline())
    _limit_memory()
    for request in requests:
        # The default answer to SIGPROF ends a process, within any operation.
        signal.setitimer(signal.ITIMER_PROF, given["seconds"])
        answer = _line(rendered(given["template"], given["tokens"], json.loads(request)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(answer)
        answers.flush()


def rendered(template: str, tokens: Mapping[str, str], asked: Mapping[str, Any]) -> dict[str, str]:
    """{"text": ...}, or {"error": ...} in one line, whatever the template does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        variables = {**tokens, **asked["variables"]}
        text = render_jinja_template([asked["conversation"]], chat_template=template, **variables)[0][0]
        if len(text) > _LONGEST_TEXT:
            raise ValueError(f"it writes {len(text)} characters")
        return {"text": text}
    except Exception as error:  # of any kind that Python has: the template decides which
        said = (str(error).strip() or "no reason given").splitlines()[0]
        return {"error": f"{type(error).__name__}: {said}"[:500]}


def _limit_memory() -> None:
    import resource

    status = Path("/proc/self/statm")  # absent on systems that have no such limit anyway
    if status.exists():
        has = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + _BYTES, has + _BYTES))


if __name__ == "__main__":
    _serve()
