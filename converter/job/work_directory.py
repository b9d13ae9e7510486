"""The directory in which a job is done: held by one process, known as ours, and cleared by names."""

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitwright.calibration.control import Interrupted
from bitwright.converter.boundary.interrupts import STOPPED
from bitwright.converter.record.log import LOG_FILE
from bitwright.formats.errors import ConvertError, TryAgain
from bitwright.formats.files.disk import make_directory, remove, remove_tree
from bitwright.formats.files.whole import whole_file
from bitwright.formats.names import LONGEST_NAME, shortened

UNDECIDED = "undecided"
"""The value of a fingerprint's field that is not known before some of the work is done."""

LOCK, DESCRIPTION, REPLACEABLE = "lock", "job.json", "replaceable.json"
CACHE_QUALITY = "quality-kv.json"
"""What an artifact loses with keys and values in fewer bits, by their format; written once it is finished."""
# Everything that the stages keep in a work directory, and so all that may be deleted of it.
_KEPT = frozenset(
    (
        *(
            "calibration",
            "imatrix.gguf",
            "moments",
            "source",
            "source.unfinished",
            "super-weights",
            "super_weights.json",
        ),
        *("activations", "activations.safetensors", "smoothing.safetensors", "activation-rows"),
        *("activations-smoothed.safetensors", "calibration-smoothed"),
        *("analysis", "sensitivity.jsonl", "sensitivity.safetensors", "refinement", "corrections.json"),
        *("protection", "protection.json", "folding.json", "encoded.jsonl", REPLACEABLE),
        *("quality", "quality.json", "agreement", "agreement.json", "candidate-logits.npy", "runtime-logits.npy"),
        *("guard", "coherence.json", "generated.json", "tasks.json"),
        *("sequential", "sequential-pass", "sequential-moments"),
        *("plan.json", "report.html", "report.json", "report-split.json", CACHE_QUALITY, "seals.jsonl", LOG_FILE),
        "piece",
    )
)
_DRAFTS = ((".", ".tmp"), (".", ".partial"), (".", ".fetched"), (".unsealed-", ""), ("..unsealed-", ".tmp"))
# And what a kill leaves while one of them is written.
_DELETED = _KEPT | {f"{begin}{name}{end}" for name in _KEPT for begin, end in _DRAFTS}
# The beginning of every description of a job, even of one that was damaged further on.
_OURS = re.compile(rb'\{\s*"tool":\s*"[^"]+\+[0-9a-f]{12}"')


class Stopped(ConvertError):
    """The user asked the job to stop, and everything done so far is saved."""

    exit_code = STOPPED

    def __init__(self, where: Path, resume_command: str):
        super().__init__("stopped as asked; nothing is lost", str(where), f"resume with: {resume_command}")


@contextmanager
def stops_cleanly(work_dir: Path, resume_command: str) -> Iterator[None]:
    """Turn an interruption that the user asked for into the message that says how to continue."""
    try:
        yield
    except Interrupted:
        raise Stopped(work_dir, resume_command) from None


def default_work_dir(output: Path) -> Path:
    """The directory beside the output: m.bitwright for m.gguf, m.bitwright-work for m, so that two outputs never share
    one.

    Raises ConvertError for an output without a name of its own, such as ".."."""
    if output.name in ("", ".."):
        raise ConvertError("the output has no name of its own", str(output), "write its name: --output DIRECTORY/NAME")
    stem, ending = output.name, ".bitwright-work"
    if output.suffix == ".gguf":
        stem, ending = output.stem, ".bitwright"
    return output.with_name(shortened(stem, LONGEST_NAME - len(ending)) + ending)


class WorkDirectory:
    """The directory that holds a job's checkpoints and results.

    job.json       the fingerprint: finished work is reused only under the same one
    calibration/   checkpoints of the layer stream, gone when it is done
    moments/       second moments of the inputs, gone when the tensors are encoded
    super-weights/ checkpoints of the search for super weights
    job.log        what was said, and the whole of an error
    imatrix.gguf, super_weights.json, protection.json, folding.json, encoded.jsonl, report.json
                   the stages' results; a stage whose result is there does not run again
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def is_begun(self) -> bool:
        """Whether a job has been here."""
        return (self.path / DESCRIPTION).exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory for this process. The lock of a killed process is gone with it.

        Raises ConvertError where another process holds the lock, and for a directory that is not empty and holds no job
        of ours."""
        make_directory(self.path, "name another one with --work-dir")
        try:
            self._check_ours()
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConvertError(
                f"the work directory cannot be used: {error}", str(self.path), "name another one with --work-dir"
            ) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TryAgain(
                    "another process is working in this directory",
                    str(self.path),
                    "wait for it to end, or name another directory with --work-dir",
                ) from None
            except OSError as error:
                raise ConvertError(
                    f"the work directory cannot be locked against a second job ({error.strerror})",
                    str(self.path),
                    "name a directory on a disk of this machine with --work-dir",
                ) from None
            yield
        finally:
            os.close(descriptor)

    def _check_ours(self) -> None:
        stored = self.path / DESCRIPTION
        if stored.is_file() and _OURS.match(stored.read_bytes()[:200]):
            return
        # A run that was killed at its very beginning leaves no more than these.
        names = [path.name for path in self.path.iterdir() if path.name not in (LOCK, f".{DESCRIPTION}.tmp")]
        if names:
            raise ConvertError(
                f"the directory is not empty, and holds no job of this tool: there is {min(names)}",
                str(self.path),
                "name a new or an empty directory with --work-dir",
            )

    def claim(self, fingerprint: dict[str, Any], fresh: bool = False) -> None:
        """Take the directory for the job of this fingerprint. fresh: it has been cleared of another job's work.

        A field that is UNDECIDED differs from no value; a later claim decides it. Raises ConvertError where the
        directory holds the work of another job or of another version of this tool."""
        stored = self.path / DESCRIPTION
        if fresh or not stored.exists():
            _describe_job(stored, fingerprint)
            return
        previous = self.description()
        if previous.get("tool") != fingerprint.get("tool"):
            raise ConvertError(
                "another version of this tool began the job in this work directory, and its results are not mixed with"
                f" this one's (begun by {previous.get('tool')}, this is {fingerprint.get('tool')})",
                str(stored),
                "finish it with that version, name another directory with --work-dir, or start over with --fresh",
            )
        undecided = {key for of in (previous, fingerprint) for key, value in of.items() if value == UNDECIDED}
        keys = [key for key in {**previous, **fingerprint} if key not in undecided]
        differing = [key for key in keys if previous.get(key) != fingerprint.get(key)]
        if differing:
            key = differing[0]
            raise ConvertError(
                f"the work directory belongs to another job: {', '.join(differing)} differ"
                f" ({key} was {_short(previous.get(key))}, is {_short(fingerprint.get(key))})",
                str(stored),
                "name another directory with --work-dir, or start over in this one with --fresh",
            )
        if UNDECIDED in previous.values() and UNDECIDED not in fingerprint.values():
            _describe_job(stored, fingerprint)

    def description(self) -> dict[str, Any]:
        """The fingerprint of the job whose work is here; empty where there is none. Raises ConvertError for one that is
        damaged."""
        stored = self.path / DESCRIPTION
        if not stored.exists():
            return {}
        try:
            described = json.loads(stored.read_bytes())
        except ValueError:
            described = None
        if not isinstance(described, dict):
            raise ConvertError("the job's description is damaged", str(stored), "start again with --fresh")
        return described

    def clear(self) -> None:
        """Remove the results of earlier runs, by their names. Other files stay, and so does the job's description until
        a fresh claim: it marks the directory as ours."""
        self._check_ours()
        for name in sorted(_DELETED):
            path = self.path / name
            if path.is_symlink() or path.is_file():
                remove(path)
            else:
                remove_tree(path)  # and what a kill has left of its removal


def _describe_job(path: Path, fingerprint: dict[str, Any]) -> None:
    with whole_file(path, "job's description") as file:
        file.write(json.dumps(fingerprint, indent=1).encode())


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
