"""The size of micro-batches: fixed on a CPU, by free memory on a GPU, whose figures are made up here."""

import pytest
import torch

from bitwright.calibration.stream.device.memory import MicroBatch
from bitwright.calibration.stream.micro_batches import largest_micro_batch
from bitwright.formats.errors import ConvertError

GIB = 1 << 30
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_on_a_cpu_the_size_is_fixed_and_nothing_is_tried():
    def run_one() -> None:
        raise AssertionError("a trial")

    for length, samples in ((128, 4), (2048, 1)):
        batch = largest_micro_batch(CPU, length)
        batch.fit(CPU, 2, 0, run_one)
        assert batch == MicroBatch(samples, samples, fitted=True)


def test_a_gpu_takes_whole_groups_of_what_a_cpu_takes():
    class Smoothed:
        one_group_at_once = True

    assert largest_micro_batch(CUDA, 110) == MicroBatch(72, 4)
    assert largest_micro_batch(CUDA, 110, Smoothed()) == largest_micro_batch(CPU, 110)
    batch = MicroBatch(72, 4)
    batch.halve(CPU, RuntimeError())
    assert batch.samples == 36
    for samples in (16, 8, 4, 2, 1):
        batch.halve(CPU, RuntimeError())
        assert batch.samples == samples
    with pytest.raises(ConvertError, match="memory of the cuda device is full"):
        batch.halve(CUDA, RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))


@pytest.mark.parametrize(
    ("per_sample", "expected"),
    [(GIB // 100, 32), (GIB // 10, 8), (GIB // 3, 3), (7 * GIB, 1)],
    ids=["all fit", "a few groups", "less than a group", "not even one"],
)
def test_on_a_gpu_half_of_the_free_memory_decides_once(per_sample, expected, monkeypatch):
    tried, weights = [], 2 * GIB
    # 9 GiB are free on the device; the allocator holds 3 GiB, of which 1 GiB is unused. The next layer takes 2 GiB.
    figures = {
        "mem_get_info": (9 * GIB, 24 * GIB),
        "memory_allocated": weights,
        "memory_reserved": 3 * GIB,
        "max_memory_allocated": weights + per_sample,
        "reset_peak_memory_stats": None,
    }
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, figure=figure: figure)
    batch = MicroBatch(32, 4)
    for _ in range(2):
        batch.fit(CUDA, 4, 2 * GIB, lambda: tried.append(1))
        assert batch.samples == expected
    assert tried == [1]
    again = MicroBatch(32, 4)
    again.continued(batch.to_json())
    assert again == batch
