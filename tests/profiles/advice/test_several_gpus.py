"""A model that several GPUs share: what each has to hold, and what stays what it is."""

import pytest

from bitwright.profiles.advice.cache import AttentionLayer, Cache, cache_format
from bitwright.profiles.advice.hardware import find_device
from bitwright.profiles.advice.several_gpus import LayerSplit, all_together, heads_refusal, repeated

F16 = cache_format("F16")


def fullest(split: LayerSplit, kv: int, gpus: int) -> float:
    """Bytes of the GPU that has most, by dealing layers out, and the output last, as evenly as whole ones allow."""
    layer = (split.in_layers + kv) / split.layers
    units, most = [layer] * split.layers + [split.outside], -(-(split.layers + 1) // gpus)
    return max(sum(units[first : first + most]) for first in (*range(0, len(units), most), len(units) - most))


@pytest.mark.parametrize("gpus", [2, 3, 4, 6])
@pytest.mark.parametrize("outside", [10, 5000])
def test_the_fullest_gpu_of_layers_is_full(gpus, outside):
    split = LayerSplit(layers=5, in_layers=50_000, outside=outside)
    room = split.room(40_000, gpus)
    assert fullest(split, room, gpus) <= 40_000 < fullest(split, room + 5 * 5, gpus)
    assert room > LayerSplit(5, 50_000, outside).room(40_000, 1)


def test_what_does_not_fit_leaves_no_room():
    assert LayerSplit(5, 50_000, 10).room(9_000, 6) < 0
    assert LayerSplit(5, 50_000, 20_000).room(12_000, 6) < 0, "the output has to fit on one"


def test_heads_that_are_fewer_than_gpus_are_kept_twice():
    grouped = Cache((AttentionLayer(32, 8, 128, 128),))
    assert repeated(grouped, 4) == grouped
    assert repeated(grouped, 16).allocated(256, 1, F16) == 2 * grouped.allocated(256, 1, F16)
    latent = Cache((AttentionLayer(32, 1, 576, 512, latent=True),))
    assert repeated(latent, 4).allocated(256, 1, F16) == 4 * latent.allocated(256, 1, F16), "all keep the latent"


@pytest.mark.parametrize(("gpus", "why"), [(3, "not divide 32"), (2, None), (8, None), (16, None), (64, "divide 32")])
def test_heads_are_cut_into_whole_ones(gpus, why):
    found = heads_refusal(Cache((AttentionLayer(32, 8, 128, 128),)), gpus)
    assert found is None if why is None else why in found
    assert "do not go with 4 GPUs" in heads_refusal(Cache((AttentionLayer(12, 6, 64, 64),)), 4)


def test_an_ideal_device_has_the_same_ridge():
    one = find_device("H100")
    four = all_together(one, 4)
    assert (four.memory, four.bandwidth) == (4 * one.memory, 4 * one.bandwidth)
    assert four.ridge() == one.ridge()
