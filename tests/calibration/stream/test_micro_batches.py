"""The size of micro-batches: fixed on a CPU, by free memory on a GPU, whose figures are made up here."""

import pytest
import torch

from bitwright.calibration.stream.micro_batches import fitting_samples, most_samples

GIB = 1 << 30


def test_on_a_cpu_the_size_is_fixed_and_nothing_is_tried():
    def run_one() -> None:
        raise AssertionError("a trial")

    assert fitting_samples(torch.device("cpu"), 4, run_one) == 4
    assert most_samples(torch.device("cpu"), 128) == 4
    assert most_samples(torch.device("cpu"), 2048) == 1


@pytest.mark.parametrize(
    ("per_sample", "expected"),
    [(GIB // 10, 32), (GIB, 5), (7 * GIB, 1), (100 * GIB, 1)],
    ids=["all fit", "some fit", "one fits", "not even one"],
)
def test_on_a_gpu_half_of_the_free_memory_decides(per_sample, expected, monkeypatch):
    tried, weights = [], 2 * GIB
    # 9 GiB are free on the device; the allocator holds 3 GiB, of which 1 GiB is unused.
    figures = {
        "mem_get_info": (9 * GIB, 24 * GIB),
        "memory_allocated": weights,
        "memory_reserved": 3 * GIB,
        "max_memory_allocated": weights + per_sample,
        "reset_peak_memory_stats": None,
    }
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, figure=figure: figure)
    assert fitting_samples(torch.device("cuda"), 32, lambda: tried.append(1)) == expected
    assert tried == [1]
