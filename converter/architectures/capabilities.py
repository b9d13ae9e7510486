"""What works for every architecture, read from the data files: what `bitwright architectures` and docs/architectures.md
tell."""

from collections.abc import Iterable
from dataclasses import dataclass

from bitwright.converter.architectures.architecture import architectures
from bitwright.converter.architectures.description import Architecture
from bitwright.profiles.vocabulary import Role

CAPABILITIES = ("gguf", "directory", "calibration", "gradients", "smoothing")
"""A GGUF of it, a directory, importance by running it, sensitivity by its gradients, outliers moved into weights."""
_NEED_A_RUN = ("gradients", "smoothing")
_HEADERS = ("architecture", "model types", "llama.cpp", "GGUF", *CAPABILITIES[1:])
_NO_HEAD = "it predicts no tokens"
_NO_FEEDS = "the data file has no [feeds]"


@dataclass(frozen=True)
class Support:
    """name: of the data file. gguf_name: llama.cpp's. lacking: capability -> why it does not work. mtp: whether a GGUF
    keeps the layer that predicts several tokens, where one is stored."""

    name: str
    gguf_name: str
    model_types: tuple[str, ...]
    lacking: dict[str, str]
    mtp: bool = False

    def to_dict(self) -> dict[str, object]:
        works: dict[str, object] = {capability: capability not in self.lacking for capability in CAPABILITIES}
        named = {"name": self.name, "model_types": list(self.model_types), "llama_cpp": self.gguf_name}
        return {**named, **works, "mtp": self.mtp, "reasons": self.lacking}


def supported() -> list[Support]:
    """Of every data file, by name."""
    return [_support(architecture) for architecture in architectures()]


def _support(architecture: Architecture) -> Support:
    lacking = dict(architecture.without)
    if why := lacking.get("calibration"):
        lacking = {**dict.fromkeys(_NEED_A_RUN, why), **lacking}
    if not any(rule.role is Role.OUTPUT for rule in architecture.after):
        lacking.setdefault("gradients", _NO_HEAD)
    if not architecture.feeds:
        lacking.setdefault("smoothing", _NO_FEEDS)
    in_order = {capability: lacking[capability] for capability in CAPABILITIES if capability in lacking}
    named = architecture.name, architecture.gguf_name, architecture.model_types
    return Support(*named, in_order, architecture.mtp is not None)


def plain_table(rows: Iterable[Support]) -> str:
    """In columns, for a terminal."""
    cells, notes = _cells(rows)
    widths = [max(map(len, column)) for column in zip(_HEADERS, *cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    header = "  ".join(cell.ljust(width) for cell, width in zip(_HEADERS, widths, strict=True))
    return "\n".join(line.rstrip() for line in [header, *lines, *notes])


def markdown_table(rows: Iterable[Support]) -> str:
    """For docs/architectures.md."""
    cells, notes = _cells(rows)
    lines = [_HEADERS, ("---",) * len(_HEADERS), *cells]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([table, *(["", *(f"{note}  " for note in notes)] if notes else [])]).rstrip()


def _cells(rows: Iterable[Support]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The cells of every line, and the reasons by their numbers."""
    reasons: dict[str, int] = {}
    lines = []
    for row in rows:
        works = [
            f"no ({reasons.setdefault(row.lacking[name], len(reasons) + 1)})" if name in row.lacking else "yes"
            for name in CAPABILITIES
        ]
        lines.append((row.name, ", ".join(row.model_types), row.gguf_name, *works))
    return lines, [f"({number}) {reason}" for reason, number in reasons.items()]
