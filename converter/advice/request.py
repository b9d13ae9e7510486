"""What advice is asked for, checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitwright.converter.job.options import check_value
from bitwright.converter.source.hub import is_hub_id
from bitwright.formats.errors import ConvertError
from bitwright.profiles.advice.cache import cache_format
from bitwright.profiles.sizes import parse_size

THIS = "this"
DEFAULT_CONTEXT = 32768
Phase = Literal["decode", "prefill", "both"]
RuntimeChoice = Literal["llama.cpp", "vllm", "any"]
AttentionChoice = Literal["auto", "fa1", "fa2", "fa3", "fa4"]


@dataclass(frozen=True)
class Request:
    """hardware: a name of the registry, or "this". context: tokens of each text, None for DEFAULT_CONTEXT or what the
    model was made for, batch: how many texts at once. gpus: how many of the device the model is spread over. memory:
    bytes for the model and its cache on each, None for what the device has. kv: a format of keys and values, or "auto".
    measured: profile -> tokens a second that the user has measured with it there, one text. profile, overrides: price
    this one alone. sensitivity: a table that predicts divergences; work_dir: where a report may lie. reports: a
    repository of the Hub with reports of this model, "org/name" or "org/name@revision".
    target_speed: tokens a second, max_kld: nats, that the best is to satisfy."""

    model: str
    hardware: str = THIS
    context: int | None = None
    batch: int = 1
    gpus: int = 1
    phase: Phase = "both"
    memory: int | None = None
    runtime: RuntimeChoice = "any"
    attention: AttentionChoice = "auto"
    kv: str = "auto"
    profile: str | None = None
    overrides: tuple[str, ...] = ()
    measured: tuple[tuple[str, float], ...] = ()
    target_speed: float | None = None
    max_kld: float | None = None
    sensitivity: Path | None = None
    work_dir: Path | None = None
    reports: str | None = None
    from_quantized: bool = False
    base: str | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        """Raises ConvertError for a value that its field cannot have."""
        for name, value, choices in (
            ("phase", self.phase, Phase),
            ("runtime", self.runtime, RuntimeChoice),
            ("attention", self.attention, AttentionChoice),
        ):
            check_value(name, value, choices, f"--{name}")
        context = 1 if self.context is None else self.context
        for name, number in (("context", context), ("batch", self.batch), ("gpus", self.gpus)):
            check_value(name, number, int, f"--{name}")
            if number < 1:
                raise ConvertError(f"{name} is {number}, and is 1 at least", f"--{name}", "leave it out")
        if self.kv != "auto":
            cache_format(self.kv)
        if self.reports is not None and not is_hub_id(self.reports):
            raise ConvertError(f"{self.reports!r} is no repository of the Hub", "--reports", "write it as org/name")
        if self.overrides and self.profile is None:
            raise ConvertError("--set changes a profile, and none is named", "--set", "add --profile NAME")
        for name, goal in (("--target-tokens-per-second", self.target_speed), ("--max-kld", self.max_kld)):
            if goal is not None and not 0 < goal < float("inf"):
                raise ConvertError(f"{goal} is no goal", name, "give a positive number")


def request_of(model: str | Path, **options: object) -> Request:
    """The request of options as people write them: memory "24GiB", measured "PROFILE=41.2" or a list of such. Raises
    ConvertError for an unknown option and for a value that none can have."""
    from dataclasses import fields

    from bitwright.formats.errors import nearest

    known = [field.name for field in fields(Request)]
    for name in options:
        if name not in known:
            raise ConvertError(f"there is no option {name!r}", f"{name}={options[name]!r}"[:80], nearest(name, known))
    values = {name: value for name, value in options.items() if value is not None}
    if isinstance(memory := values.get("memory"), str):
        values["memory"] = parse_size(memory, "--memory")
    if "measured" in values:
        values["measured"] = _measured(values["measured"])
    if isinstance(overrides := values.get("overrides"), str | list):
        values["overrides"] = (overrides,) if isinstance(overrides, str) else tuple(overrides)
    for name in ("sensitivity", "work_dir"):
        if isinstance(path := values.get(name), str):
            values[name] = Path(path)
    return Request(str(model), **values)  # type: ignore[arg-type]


def _measured(given: object) -> tuple[tuple[str, float], ...]:
    texts = (given,) if isinstance(given, str) else given
    found = []
    for text in texts if isinstance(texts, list | tuple) else ():
        if isinstance(text, tuple):
            found.append(text)
            continue
        profile, equals, speed = str(text).partition("=")
        try:
            value = float(speed)
        except ValueError:
            value = 0.0
        if not equals or not profile or not 0 < value < float("inf"):
            raise ConvertError(
                f"{text!r} is no measured speed",
                "--measured",
                "write PROFILE=TOKENS_PER_SECOND, such as balanced-4bit=41.2",
            )
        found.append((profile, value))
    return tuple(found)
