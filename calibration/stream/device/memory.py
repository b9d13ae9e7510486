"""A GPU's memory: what is free of it, how many samples at once it holds, and what happens when it is full."""

import gc
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bitwright.formats.errors import ConvertError

# Of a GPU's free memory, what the micro-batches in flight may take. The rest is for what the allocator wastes.
_SHARE_OF_FREE = 0.5


def free_bytes(device: torch.device) -> int | None:
    """What is free of a GPU's memory; None of a CPU, which has none of its own."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory is full; torch says so of Metal in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "MPS backend out of memory" in str(error)
    )


def release(device: torch.device, error: BaseException) -> None:
    """Give back what the allocator holds and nobody uses. error: what torch said, whose frames hold tensors."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def device_full(device: torch.device, error: BaseException) -> ConvertError:
    """The user's terms for it. error: what torch says."""
    told = str(error).partition("\n")[0].partition(". ")[0]
    return ConvertError(
        f"the memory of the {device.type} device is full, with as little in it at once as can be ({told})",
        "--device",
        "end other programs on the GPU, give a shorter --sequence-length, or compute with --device cpu",
    )


@contextmanager
def memory_explained(device: torch.device) -> Iterator[None]:
    """A full GPU, where nothing smaller can be tried, in the user's terms."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise device_full(device, error) from error


@dataclass
class MicroBatch:
    """How many samples go through a layer at once.

    samples: so many. group: samples whose sums belong together on every device; where there is room for a group, whole
    ones are taken. fitted: whether the device's memory has been looked at, which happens once in a pass: what a layer
    computes is the same to the bit only where samples are taken together as before. A checkpoint keeps both.
    """

    samples: int
    group: int
    fitted: bool = False

    def fit(self, device: torch.device, n_at_once: int, ahead: int, run_one: Callable[[], object]) -> None:
        """No more than a GPU's free memory holds. n_at_once: micro-batches in flight. ahead: bytes of what is loaded
        meanwhile. run_one: takes one sample through a layer; what that takes is measured where the device tells."""
        if not self.fitted and device.type == "cuda" and self.samples > 1:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            with memory_explained(device):
                run_one()
            one = torch.cuda.max_memory_allocated(device) - before
            room = _SHARE_OF_FREE * max(0, (free_bytes(device) or 0) - ahead) / n_at_once
            self._take(min(self.samples, int(room) // max(one, 1)))
        self.fitted = True

    def halve(self, device: torch.device, error: BaseException) -> None:
        """After the memory was full. Raises ConvertError where that was with one sample."""
        if self.samples == 1:
            raise device_full(device, error)
        self._take(self.samples // 2)
        release(device, error)

    def _take(self, samples: int) -> None:
        self.samples = max(1, samples - samples % self.group if samples >= self.group else samples)

    def to_json(self) -> dict[str, Any]:
        return {"samples": self.samples, "fitted": self.fitted}

    def continued(self, data: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.samples, self.fitted = data["samples"], data["fitted"]
