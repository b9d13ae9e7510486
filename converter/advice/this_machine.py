"""The machine at hand as a device: what it has, and how fast its memory is, measured in a second or two."""

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bitwright.converter.boundary.machine import cpu_name, instruction_sets, nvidia_gpu
from bitwright.formats.errors import ConvertError
from bitwright.profiles.advice.hardware import Architecture, Device, find_device

_BYTES = 256 << 20  # beyond any cache, a thread
_SECONDS = 0.6
_BEST_OF = 3


def this_machine(threads: int) -> Device:
    """A GPU that NVIDIA's driver lists and that is in the registry; or else the CPU, its bandwidth measured by reading
    with so many threads. Raises ConvertError for a GPU that is not in the registry."""
    if (name := nvidia_gpu()) is not None:
        return find_device(name.removeprefix("NVIDIA ").removeprefix("GeForce "))
    if platform.system() == "Darwin" and (chip := platform.processor()):
        raise ConvertError(
            f"what GPU a Mac has cannot be read here ({chip})", "--hardware this", "name the chip: --hardware 'M2 Max'"
        )
    found = f"measured on this machine with {threads} threads"
    return Device(
        cpu_name(),
        "this machine",
        Architecture("x86" if "86" in platform.machine() else platform.machine(), "cpu", "standard", {}, {}),
        "ddr",
        memory_bytes(),
        measured_bandwidth(threads),
        {},
        {"memory": found, "bandwidth": found},
        instructions=instruction_sets(),
    )


def measured_bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read together, the best of a few tries. Sums of large arrays, whose time is
    that of their memory."""
    arrays = [np.ones(_BYTES // 8 // max(1, threads // 4), np.float64) for _ in range(threads)]
    n_bytes = sum(array.nbytes for array in arrays)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_BEST_OF):
            start = time.perf_counter()
            rounds = 0
            while time.perf_counter() - start < _SECONDS:
                list(pool.map(np.add.reduce, arrays))
                rounds += 1
            best = max(best, rounds * n_bytes / (time.perf_counter() - start))
    return best


def memory_bytes() -> int:
    """Of the system, or what its control group leaves to it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        text = limit.read_text().strip()
    except OSError:
        return total
    return min(total, int(text)) if text.isdigit() else total
