"""What this machine is called, and whether a GPU is in it, without asking torch."""

import os
import platform
from pathlib import Path

_NVIDIA = Path("/proc/driver/nvidia/gpus")
# Instructions that the speed of encoders, calibration and llama.cpp hangs on, as LLVM calls them.
_INSTRUCTIONS = ("avx2", "fma", "f16c", "avx512f", "avx512vnni", "avx512bf16", "amx-int8", "neon", "dotprod", "sve")


def usable_cores() -> int:
    """The cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Those of _INSTRUCTIONS that this CPU has."""
    from llvmlite import binding

    host = binding.get_host_cpu_features()
    return tuple(name for name in _INSTRUCTIONS if host.get(name))


def nvidia_gpu() -> str | None:
    """The name of the first GPU that NVIDIA's driver lists; None without one."""
    for path in sorted(_NVIDIA.glob("*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None
