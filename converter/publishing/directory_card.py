"""What is said of a safetensors directory alone: how the Hub files it, and what transformers needs to run it."""

from collections.abc import Iterator

from bitwright.converter.report.data import Report
from bitwright.formats.schemes.registry import SCHEMES, Scheme

LIBRARY = "transformers"
TAGS = ("compressed-tensors", "vllm", "bitwright")


def must_be_dequantized(report: Report) -> bool:
    """Whether transformers computes with the weights only after it has decoded them."""
    return any(not scheme.weights.symmetric for _, scheme in _schemes(report))


def runs_in_transformers(report: Report) -> bool:
    """Whether transformers has layers for it: it has no experts whose inputs are rounded to integers."""
    return not any(group == "experts" and scheme.format == "int-quantized" for group, scheme in _schemes(report))


def _schemes(report: Report) -> Iterator[tuple[str, Scheme]]:
    """The scheme of each format, with the group of tensors that has it."""
    for group in report.groups:
        yield from ((group.group, SCHEMES[name]) for name in group.formats if name in SCHEMES)
