"""The registry of hardware: what a device has, from the tables in profiles/hardware/, every figure with its source.

A file is a family: its sources, its architectures with what they can compute, its devices. Figures are dense: what a
vendor states for weights with two zeros in four is twice that.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from bitwright.formats.errors import ConvertError, nearest
from bitwright.profiles.reading.strict import Table, known_keys, number, one_of, one_table, strings, tables

Backend = Literal["cuda", "rocm", "metal", "cpu"]
"""What llama.cpp runs on there."""
MemoryKind = Literal["gddr", "hbm", "lpddr", "ddr"]
Support = Literal["native", "weights", "none"]
"""native: products in the format. weights: it is decoded on the way, and products are in 16 bits: smaller, and no
faster where arithmetic is the limit. none: the runtime has no usable kernel."""
Attention = Literal["standard", "fa1", "fa2", "fa3", "fa4"]
"""The attention kernel: writing and reading the scores, or a version of FlashAttention."""
Runtime = Literal["llama.cpp", "vLLM"]

GIB = 1024**3
_RATES = ("fp16", "fp16_acc16", "int8", "fp8", "fp4")
_CORES = re.compile(r"\s*\(\d+c\)$")


@dataclass(frozen=True)
class Architecture:
    """vllm, llama_cpp: number format -> how its kernels run there. Of vLLM what is not named has no kernel; llama.cpp
    decodes what is not named. attention: the best kernel there is for it."""

    name: str
    backend: Backend
    attention: Attention
    vllm: Mapping[str, Support]
    llama_cpp: Mapping[str, Support]


@dataclass(frozen=True)
class Device:
    """memory, usable: bytes that are built in, and that a process can have, where that was read. bandwidth: bytes a
    second. rates: number format -> operations a second; fp16 accumulates in float32, fp16_acc16 in float16, as
    llama.cpp does, which GeForce cards do at twice the rate. several_sizes: it is sold with less memory, too, or that
    is whatever is built in. sources: figure -> where it was read, and when. instructions: sets of them that a measured
    CPU has."""

    name: str
    family: str
    architecture: Architecture
    memory_kind: MemoryKind
    memory: int
    bandwidth: float
    rates: Mapping[str, float]
    sources: Mapping[str, str]
    usable: int | None = None
    several_sizes: bool = False
    aliases: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()

    @property
    def backend(self) -> Backend:
        return self.architecture.backend

    @property
    def available(self) -> int:
        """Bytes that a process can have, as far as is known."""
        return self.usable or self.memory

    @property
    def prompt_rate(self) -> float | None:
        """Operations a second that prompts are measured against."""
        return self.rates.get("fp16_acc16", self.rates.get("fp16"))

    def ridge(self, rate: str = "fp16") -> float | None:
        """Operations a byte from which on arithmetic, and no longer memory, is the limit; None for an unknown rate."""
        return self.rates[rate] / self.bandwidth if rate in self.rates else None


def find_device(name: str) -> Device:
    """The device of this name, in any spelling: "RTX 4090", "rtx-4090", "M2 Ultra (76c)". Raises ConvertError for one
    that is not in the registry, with the nearest names."""
    by_name = _by_name()
    for candidate in (name, _CORES.sub("", name)):
        if (device := by_name.get(_folded(candidate))) is not None:
            return device
    raise ConvertError(
        f"the hardware {name!r} is not in the registry",
        "--hardware",
        f"{_suggestion(name)}; --hardware this measures the machine at hand; docs/advise.md tells how to add one",
    )


@cache
def devices() -> tuple[Device, ...]:
    """All that are known, family by family. Raises ConvertError for a table that is no good."""
    found: list[Device] = []
    directory = files("bitwright.profiles") / "hardware"
    for file in sorted(directory.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".toml"):
            found += read_family(file.read_text(encoding="utf-8"), file.name)
    return tuple(found)


def read_family(text: str, where: str) -> list[Device]:
    """The devices of a family's file. where: its name, for messages. Raises ConvertError for an unknown key, a figure
    without a source, a source or an architecture that is not described, and a value that none can have."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConvertError(f"the table is no TOML: {error}", where, "correct the line") from None
    known_keys(table, ("family", "sources", "architecture", "device"), where)
    (family,) = strings(table.get("family"), f"{where}: family")
    legend = {key: _source(entry, f"{where}: sources.{key}") for key, entry in _table(table, "sources", where).items()}
    architectures = {
        name: _architecture(name, entry, f"{where}: architecture.{name}")
        for name, entry in _table(table, "architecture", where).items()
    }
    return [_device(entry, family, legend, architectures, where) for entry in tables(table["device"], where, "device")]


def _table(table: Table, key: str, where: str) -> Table:
    return one_table(table.get(key), where, key)


def _source(entry: object, where: str) -> str:
    source = one_table(entry, where, "sources")
    known_keys(source, ("text", "read"), where)
    (text,), (read,) = (strings(source.get(key), f"{where}.{key}") for key in ("text", "read"))
    return f"{text}, read {read}"


def _architecture(name: str, entry: object, where: str) -> Architecture:
    table = one_table(entry, where, "architecture")
    known_keys(table, ("backend", "attention", "vllm", "llama_cpp"), where)
    kernels = {
        runtime: {
            number_format: one_of(support, Support, "support", f"{where}.{runtime}.{number_format}")
            for number_format, support in one_table(table.get(runtime), where, runtime).items()
        }
        for runtime in ("vllm", "llama_cpp")
    }
    return Architecture(
        name,
        one_of(table.get("backend"), Backend, "backend", where),
        one_of(table.get("attention"), Attention, "attention kernel", where),
        **kernels,
    )


def _device(
    entry: Table, family: str, legend: Mapping[str, str], architectures: Mapping[str, Architecture], file: str
) -> Device:
    (name,) = strings(entry.get("name"), f"{file}: name")
    where = f"{file}: {name}"
    known_keys(
        entry,
        (
            *("name", "aliases", "architecture", "memory_kind", "memory_gib", "usable_gib", "bandwidth_gbs"),
            *("dense_tflops", "several_sizes", "sources"),
        ),
        where,
    )
    architecture = str(entry.get("architecture"))
    if architecture not in architectures:
        raise ConvertError(f"unknown architecture {architecture!r}", where, nearest(architecture, [*architectures]))
    rates = one_table(entry.get("dense_tflops", {}), where, "dense_tflops")
    known_keys(rates, _RATES, where)
    usable = entry.get("usable_gib")
    device = Device(
        name,
        family,
        architectures[architecture],
        one_of(entry.get("memory_kind"), MemoryKind, "kind of memory", where),
        round(number(entry.get("memory_gib"), f"{where}: memory_gib") * GIB),
        number(entry.get("bandwidth_gbs"), f"{where}: bandwidth_gbs") * 1e9,
        {rate: number(value, f"{where}: {rate}") * 1e12 for rate, value in rates.items()},
        _sources(entry, legend, where),
        None if usable is None else round(number(usable, f"{where}: usable_gib") * GIB),
        _flag(entry, "several_sizes", where),
        strings(entry["aliases"], where) if "aliases" in entry else (),
    )
    if device.usable is not None and device.usable > device.memory:
        raise ConvertError("more memory is usable than there is", where, "correct usable_gib or memory_gib")
    return device


def _flag(entry: Table, key: str, where: str) -> bool:
    value = entry.get(key, False)
    if not isinstance(value, bool):
        raise ConvertError(f"{key} is true or false, not {value!r}", where, f"write {key} = true, or leave it out")
    return value


def _sources(entry: Table, legend: Mapping[str, str], where: str) -> dict[str, str]:
    stated = one_table(entry.get("sources"), where, "sources")
    figures = {"memory": "memory_gib", "usable": "usable_gib", "bandwidth": "bandwidth_gbs", "rates": "dense_tflops"}
    known_keys(stated, tuple(figures), where)
    for figure, key in figures.items():
        if (key in entry) != (figure in stated):
            raise ConvertError(f"{key} and its source do not come together", where, f"state sources.{figure} for {key}")
    for source in stated.values():
        if source not in legend:
            raise ConvertError(f"unknown source {source!r}", where, nearest(str(source), list(legend)))
    return {figure: legend[source] for figure, source in stated.items()}


def _folded(name: str) -> str:
    """A name without case, spaces and dashes, by which it is looked up."""
    return re.sub(r"[^a-z0-9+]", "", name.casefold())


@cache
def _by_name() -> dict[str, Device]:
    known: dict[str, Device] = {}
    for device in devices():
        for name in (device.name, *device.aliases):
            if (other := known.setdefault(_folded(name), device)) is not device:
                raise ConvertError(f"two devices are called {name!r}", f"{device.name}, {other.name}", "rename one")
    return known


def _suggestion(name: str) -> str:
    """The names that share most with this one, or the families."""
    import difflib

    by_folded = {_folded(known): device.name for device in devices() for known in (device.name, *device.aliases)}
    close = dict.fromkeys(
        by_folded[key] for key in difflib.get_close_matches(_folded(name), by_folded, n=4, cutoff=0.6)
    )
    if close:
        return f"the nearest are {', '.join(close)}"
    return f"known: {', '.join(device.name for device in devices())}"
