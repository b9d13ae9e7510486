"""In which dtype this CPU calibrates fastest: bfloat16 where it has instructions for it, and a measurement agrees.

    python -m bitwright.calibration.fastest_dtype

prints how many times as fast as float32 the matrix products of a calibration are in bfloat16. That is measured in a
process of its own, because there are virtual machines that report such instructions and end a process that uses them.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from bitwright.calibration.child import start_child

INSTRUCTIONS = ("amx-bf16", "avx512bf16")
"""Those that multiply in bfloat16, as LLVM calls them; the fastest first."""

# So many times as fast products in bfloat16 have to be: less is gone in what is not multiplied.
_LEAST_GAIN = 1.2
# What is multiplied: the tokens of a micro-batch with a matrix of a small model, for so many seconds in all.
_TOKENS, _COLUMNS, _ROWS = 512, 1024, 1024
_SECONDS = 0.8
_LONGEST = 60.0


DecidedDtype = Literal["float32", "bfloat16"]
DTYPES: tuple[DecidedDtype, ...] = get_args(DecidedDtype)


class Choice(NamedTuple):
    """A dtype, and why it is that, for people; "" where nobody needs to know."""

    dtype: DecidedDtype
    why: str


def fastest_dtype() -> Choice:
    """Of the CPU; takes about a second, beside the start of a process, where it has the instructions at all."""
    instructions = bfloat16_instructions()
    if instructions is None:
        return Choice("float32", "the CPU has no instructions for bfloat16")
    gain = measured_gain()
    if gain is None:
        return Choice("float32", f"the CPU reports {instructions}, and does not carry it out")
    figure = f"products in bfloat16 are {gain:.1f} times as fast as in float32 here ({instructions})"
    return Choice("bfloat16" if gain >= _LEAST_GAIN else "float32", figure)


def bfloat16_instructions() -> str | None:
    """What the CPU reports of INSTRUCTIONS; None for nothing."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return next((name for name in INSTRUCTIONS if features.get(name)), None)


def measured_gain() -> float | None:
    """Seconds of float32 over those of bfloat16; None where the products cannot be computed."""
    child = start_child("bitwright.calibration.fastest_dtype")
    try:
        output, _ = child.communicate(timeout=_LONGEST)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return None
    return float(json.loads(output)) if child.returncode == 0 else None


def _gain() -> float:
    """Measured in alternation on one core, as every thread of a calibration computes."""
    import torch

    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(_TOKENS, _COLUMNS, generator=random)
    weight = torch.randn(_ROWS, _COLUMNS, generator=random)

    def product(dtype: torch.dtype) -> Callable[[], object]:
        operands = inputs.to(dtype), weight.to(dtype)
        return lambda: torch.nn.functional.linear(*operands)

    products = [product(torch.float32), product(torch.bfloat16)]
    ratios: list[float] = []
    begun = time.perf_counter()
    with torch.inference_mode():
        for run in products:
            run()  # the first one prepares
        while not ratios or time.perf_counter() - begun < _SECONDS:
            exact, short = (_seconds(run) for run in products)
            ratios.append(exact / short)
    return statistics.median(ratios)


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


if __name__ == "__main__":
    print(json.dumps(_gain()))
