"""A Job: what was asked, and the work directory in which it is done, resumed, and never done twice at once."""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from calibration.activation_ranges import RangeMethod
from calibration.choices import Device, Dtype
from calibration.control import Interrupted
from calibration.smoothing import Alpha, SmoothQuantConfig
from converter.interrupts import STOPPED
from formats.block_format import Effort
from formats.errors import ConvertError, nearest
from formats.files import file_sha256, make_directory, remove, remove_tree
from formats.names import LONGEST_NAME, shortened
from formats.typed import is_a
from formats.whole_file import whole_file
from profiles.protection import Mode, Protection
from profiles.rules import LayerQuantizationConfig
from profiles.schema import QuantizationProfile

UNDECIDED = "undecided"
"""In a job's fingerprint: what is not known before some of its work is done."""

DEFAULT_SAMPLES = 512
SAMPLES_RANGE = (128, 1024)

LOCK, DESCRIPTION, REPLACEABLE = "lock", "job.json", "replaceable.json"
# Everything that the stages keep in a work directory, and so all that may be deleted of it.
_KEPT = frozenset(
    (
        *(
            "calibration",
            "importance.gguf",
            "moments",
            "source",
            "source.unfinished",
            "super-weights",
            "super_weights.json",
        ),
        *("activations", "activations.safetensors", "smoothing.safetensors", "activation-rows"),
        *("activations-smoothed.safetensors", "calibration-smoothed"),
        *("analysis", "sensitivity.jsonl", "sensitivity.safetensors", "refinement", "corrections.json"),
        *("protection", "protection.json", "encoded.jsonl", REPLACEABLE),
        *("quality", "quality.json", "agreement", "agreement.json", "runtime-logits.npy"),
        *("guard", "coherence.json", "generated.json", "tasks.json"),
        *("plan.json", "report.html", "report.json", "seals.jsonl"),
    )
)
# With what a kill leaves amid writing one of them.
_DELETED = _KEPT | {f"{begin}{name}{end}" for name in _KEPT for begin, end in ((".", ".tmp"), (".unsealed-", ""))}
# How every description of a job begins, even one that was damaged later on.
_OURS = re.compile(rb'\{\s*"tool":\s*"[^"]+\+[0-9a-f]{12}"')
DEFAULT_SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class Job:
    """Everything a conversion is asked for.

    output: the artifact's path, or a directory (anything that does not end in .gguf); None for the current one.
    work_dir: None for the default beside the output.
    samples, sequence_length: of the calibration, in sequences and tokens. shard_bytes: split the artifact in files of
    at most that many bytes. threads: 0 for every core; changes no byte. seed: of what is drawn.
    sensitivity: a table of what every format costs every tensor; None for measuring it where the profile needs it.
    target_size, target_bpw, target_kld: what the profile's budget is to meet, see profiles.budget.Budget. refine: how
    often a budget's plan is measured as a whole and corrected.
    error_feedback: choose codes together, under the second moments of the inputs, which takes a calibration even where
    an importance matrix is given.
    chat: calibrate on conversations by the tokenizer's chat template; None stands for True where it has one.
    protect_super_weights: another way than the profile's.
    alpha, activation_scales: of a directory's activations: how SmoothQuant shares the difficulty, and how static scales
    are found; None for the default.
    lm_eval, lm_eval_limit: tasks of the lm-evaluation-harness to run on the artifact, and examples of each.
    command: what continues the job when it is run again.
    """

    model: str
    profile: QuantizationProfile
    overrides: tuple[LayerQuantizationConfig, ...] = ()
    output: Path | None = None
    work_dir: Path | None = None
    imatrix: Path | None = None
    sensitivity: Path | None = None
    target_size: int | None = None
    target_bpw: float | None = None
    target_kld: float | None = None
    refine: int = 0
    calibration: str | None = None
    chat: bool | None = None
    samples: int = DEFAULT_SAMPLES
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH
    effort: Effort = "best"
    error_feedback: bool = False
    pre_tokenizer: str | None = None
    shard_bytes: int | None = None
    protect_super_weights: Mode | None = None
    alpha: Alpha | None = None
    activation_scales: RangeMethod | None = None
    quality: bool = True
    lm_eval: tuple[str, ...] = ()
    lm_eval_limit: int | None = None
    threads: int = 0
    device: Device = "auto"
    calibration_dtype: Dtype = "auto"
    seed: int = 0
    command: str = "the same call"

    def __post_init__(self) -> None:
        """Raises ConvertError for a value that its field cannot have."""
        for name, declared in _declared().items():
            check_option(name, getattr(self, name), declared)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConvertError(f"{name} is {value}, and is {least} at least", _option(name), "leave it out")
        SmoothQuantConfig(self.alpha or 0)

    def aimed(self) -> "Job":
        """This job with its targets in its profile."""
        targets = {"--target-size": self.target_size, "--target-bpw": self.target_bpw, "--target-kld": self.target_kld}
        where = ", ".join(option for option, target in targets.items() if target is not None)
        profile = self.profile.aiming_at(self.target_size, self.target_bpw, self.target_kld, where)
        if self.refine and (profile.budget is None or not profile.budget.has_goal):
            raise ConvertError(
                "what is refined is the plan of a budget, and nothing asks for one",
                "--refine",
                "add --target-size SIZE, --target-bpw BITS or --target-kld NATS",
            )
        return replace(self, profile=profile)

    def with_output(self, file_name: str) -> "Job":
        """This job with its paths decided: the artifact in the current directory unless said otherwise."""
        output = self.output or Path(file_name)
        if output.suffix != ".gguf":
            output = output / file_name
        return replace(self, output=output, work_dir=self.work_dir or default_work_dir(output))

    @property
    def protection(self) -> Protection:
        """The profile's, with the way that the job asks for."""
        protection = self.profile.protection
        return replace(protection, super_weights=self.protect_super_weights or protection.super_weights)

    @property
    def n_threads(self) -> int:
        return self.threads or usable_cores()


# What numbers are at least; where it is 1, None stands for nothing.
_LEAST = {"refine": 0, "threads": 0, "seed": 0, "shard_bytes": 1, "target_size": 1, "lm_eval_limit": 1}


@cache
def _declared() -> dict[str, Any]:
    return get_type_hints(Job)


def check_option(name: str, value: object, declared: Any) -> None:
    """Raises ConvertError for a value that is not of the declared type, with the nearest of those that are named."""
    if is_a(value, declared) and "\0" not in str(value):
        return
    choices, kinds = _choices(declared), _kinds(declared)
    named = isinstance(value, str) and len(choices) == len(kinds)
    remedy = nearest(str(value), choices) if named else f"give {' or '.join(sorted(kinds))}"
    raise ConvertError(f"{name} is {repr(value)[:60]}, which it cannot be", _option(name), remedy)


def _option(name: str) -> str:
    return f"{name}, --{name.replace('_', '-')} of the command"


def _choices(declared: Any) -> list[str]:
    """The texts that a type names."""
    if get_origin(declared) is Literal:
        return list(get_args(declared))
    return [choice for option in get_args(declared) for choice in _choices(option)]


def _kinds(declared: Any) -> set[str]:
    """What a type takes, in words."""
    words = {str: "a text", int: "a whole number", float: "a number", bool: "True or False", Path: "a path"}
    if get_origin(declared) is Literal:
        return {repr(value) for value in get_args(declared)}
    if get_origin(declared) in (tuple, list):
        return {"a list of texts"}
    if declared in words:
        return {words[declared]}
    return {kind for option in get_args(declared) for kind in _kinds(option)}


class Stopped(ConvertError):
    """The user asked for an end, and everything so far is saved."""

    exit_code = STOPPED

    def __init__(self, where: Path, resume_command: str):
        super().__init__("stopped as asked; nothing is lost", str(where), f"resume with: {resume_command}")


@contextmanager
def stops_cleanly(work_dir: Path, resume_command: str) -> Iterator[None]:
    """Turn an interruption that was asked for into the message that says how to continue."""
    try:
        yield
    except Interrupted:
        raise Stopped(work_dir, resume_command) from None


def default_work_dir(output: Path) -> Path:
    """Beside the output; two outputs never share one: m.bitwright is that of m.gguf alone, m.bitwright-work of m.

    Raises ConvertError for an output such as ".."."""
    if output.name in ("", ".."):
        raise ConvertError("the output has no name of its own", str(output), "write its name: --output DIRECTORY/NAME")
    stem, ending = output.name, ".bitwright-work"
    if output.suffix == ".gguf":
        stem, ending = output.stem, ".bitwright"
    return output.with_name(shortened(stem, LONGEST_NAME - len(ending)) + ending)


def usable_cores() -> int:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def tool_identity() -> str:
    """The release and a hash of the code that decides bytes: other encoders or statistics must not finish a job."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for package in ("formats", "calibration"):
        for path in sorted((root / package).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return f"{version('bitwright')}+{digest.hexdigest()[:12]}"


def calibration_file_sha256(job: Job) -> str | None:
    """Of the text file that the job calibrates on, None where it names a corpus."""
    path = Path(job.calibration) if job.calibration else None
    return file_sha256(path) if path is not None and path.is_file() else None


class WorkDirectory:
    """The directory that holds a job's checkpoints.

    job.json       the fingerprint: finished work is reused only under the same one
    calibration/   checkpoints of the layer stream, gone when it is done
    moments/       second moments of the inputs, gone when the tensors are encoded
    super-weights/ checkpoints of the search for super weights
    importance.gguf, super_weights.json, protection.json, encoded.jsonl, report.json
                   the stages' results; a stage whose result is there is not run again
    """

    def __init__(self, path: Path):
        self.path = path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; another process in it is refused. A killed process holds nothing.

        A directory that has anything in it without a job of ours is somebody else's, and refused."""
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
                raise ConvertError(
                    "another process is working in this directory",
                    str(self.path),
                    "wait for it to end, or name another directory with --work-dir",
                ) from None
            yield
        finally:
            os.close(descriptor)

    def _check_ours(self) -> None:
        stored = self.path / DESCRIPTION
        if stored.is_file() and _OURS.match(stored.read_bytes()[:200]):
            return
        # A run that was killed at its very beginning has left no more than this.
        names = [path.name for path in self.path.iterdir() if path.name not in (LOCK, f".{DESCRIPTION}.tmp")]
        if names:
            raise ConvertError(
                f"the directory is not empty, and holds no job of this tool: there is {min(names)}",
                str(self.path),
                "name a new or an empty directory with --work-dir",
            )

    def claim(self, fingerprint: dict[str, Any], fresh: bool = False) -> None:
        """Take the directory for the job of this fingerprint; refuse it when it holds another job's work, unless it has
        been cleared for a fresh start. A field that is UNDECIDED contradicts nothing, and is decided by a later
        claim."""
        stored = self.path / DESCRIPTION
        if fresh or not stored.exists():
            _describe_job(stored, fingerprint)
            return
        try:
            previous = json.loads(stored.read_bytes())
        except ValueError:
            previous = None
        if not isinstance(previous, dict):
            raise ConvertError("the job's description is damaged", str(stored), "start again with --fresh")
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

    def clear(self) -> None:
        """Remove what earlier runs left of their stages, by its names; anything else stays, and so does the job's
        description, by which the directory is known as ours, until a fresh claim."""
        self._check_ours()
        for name in sorted(_DELETED):
            path = self.path / name
            if path.is_symlink() or path.is_file():
                remove(path)
            else:
                remove_tree(path)  # what a kill has left of it, too


def _describe_job(path: Path, fingerprint: dict[str, Any]) -> None:
    with whole_file(path, "job's description") as file:
        file.write(json.dumps(fingerprint, indent=1).encode())


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
