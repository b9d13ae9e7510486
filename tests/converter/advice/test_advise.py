"""`bitwright advise`: what it says of a small model, and what it does without."""

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from math import prod

import pytest

from bitwright import converter
from bitwright.converter.advice.plans import Source
from bitwright.converter.advice.recommendation import Recommendation
from bitwright.converter.advice.request import request_of
from bitwright.converter.advice.stage import advise, round_down, round_up
from bitwright.converter.advice.this_machine import this_machine
from bitwright.converter.job.build import build_job
from bitwright.converter.model.module_map import describe_for_directory, describe_modules, stored_dtypes
from bitwright.converter.preparation import prepare
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.advice.hardware import devices
from bitwright.profiles.planning.plan_modules import plan_modules
from bitwright.profiles.reading.schema import load_profile
from tests import tiny_models
from tests.converter.commands import convert, refused
from tests.converter.source.hub_server import COMMIT, REPOSITORY, serve
from tests.tiny_architectures import ALL_TINY_MODELS

SPECIFIED = {
    *("config", "mixed_precision", "fa_config", "predicted_speedup", "predicted_time_us", "baseline_time_us"),
    *("memory_savings_pct", "kv_cache_bytes", "expected_quality_loss", "confidence", "reason", "bottleneck_analysis"),
}


def asked(model, **options):
    return advise(request_of(model, **{"hardware": "gb10", "context": 1024} | options))


def profiles(advice):
    return {candidate.profile: candidate for candidate in advice.candidates}


@pytest.fixture(scope="module")
def small():
    """A model that can be converted."""
    return tiny_models.checkpoint("llama-256")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Llama-3.1-8B without its numbers: a file of holes, and no tokenizer, for neither is read."""
    directory = tmp_path_factory.mktemp("models") / "Llama-3.1-8B"
    directory.mkdir()
    hidden, kv, mlp, vocab, layers = 4096, 1024, 14336, 128256, 32
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        shapes |= {block + name: (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{block}self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
        shapes |= {f"{block}self_attn.{name}_proj": (kv, hidden) for name in "kv"}
        shapes |= {f"{block}mlp.{name}_proj": (mlp, hidden) for name in ("gate", "up")}
        shapes[f"{block}mlp.down_proj"] = (hidden, mlp)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return directory


def test_the_command_prints_a_table_and_a_command_to_run(model):
    result = convert("advise", model, "--hardware", "gb10", "--context", 1024)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Llama-3.1-8B on GB10 (119.7 GiB usable, 273 GB/s stated")
    row = next(i for i, line in enumerate(lines) if line.startswith("balanced-4bit"))
    assert lines[row + 1].startswith("    llama.cpp, KV in ")
    assert f"  bitwright --profile balanced-4bit {model}" in lines
    assert any("8 of 10 measured points lie in such a range" in line for line in lines)
    assert "budget (" in result.stdout and "importance-tiers (" in result.stdout, "left out, with the reason"


def test_json_is_the_recommendation(small):
    result = convert("advise", small, "--hardware", "rtx-4090", "--context", 1024, "--json")
    data = json.loads(result.stdout)
    assert set(data) >= SPECIFIED and data["machine"]["name"] == "RTX 4090"
    assert data["best"]["profile"] == data["config"]
    assert data == asked(small, hardware="RTX 4090").to_dict()


def test_python_gives_it_frozen(model):
    advice = converter.advise(model, "gb10", context=1024, memory="24GiB")
    assert isinstance(advice, Recommendation) and {field.name for field in fields(advice)} >= SPECIFIED
    assert advice.machine.memory == 24 << 30
    with pytest.raises(FrozenInstanceError):
        advice.best = None
    with pytest.raises(ConvertError, match="did you mean 'context'"):
        converter.advise(model, "gb10", contxt=5)


def test_it_needs_no_torch_and_no_network(model):
    code = (
        "import socket, sys\n"
        "def no(*_, **__): raise OSError('the network is asked')\n"
        "socket.socket.connect = no; socket.getaddrinfo = no\n"
        "from bitwright import converter\n"
        f"converter.advise({str(model)!r}, 'gb10', context=1024)\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "profile", ["balanced-4bit", "mlp-low-precision", "fp16-baseline", "fp8", "w4a16", "nvfp4-vllm"]
)
def test_bytes_are_those_of_the_plan(small, profile, tmp_path):
    prepared = prepare(build_job(small, profile, calibration="embedded", work_dir=tmp_path))
    priced = Source.open(str(small)).price(profile)
    assert priced.tensor_bytes == prepared.plan.n_bytes
    # How long codes of a directory are chosen together changes no byte's place, and is decided later.
    expected = prepared.plan if priced.runtime == "llama.cpp" else replace(prepared.plan, error_feedback=None)
    assert priced.plan.digest() == expected.digest()
    assert priced.file_bytes == prepared.files.n_bytes, "a GGUF with the vocabulary in its header"


@pytest.mark.parametrize("name", ["gemma", "glm4", "llama", "granite"])
def test_a_vocabulary_of_any_kind_is_counted(name, tmp_path):
    source = tiny_models.checkpoint(name, ALL_TINY_MODELS[name])
    prepared = prepare(build_job(source, "uniform-8bit", calibration="embedded", work_dir=tmp_path))
    assert Source.open(str(source)).price("uniform-8bit").file_bytes == prepared.files.n_bytes


def test_a_vocabulary_that_is_not_counted_is_named(model, small, tmp_path, monkeypatch):
    assert any("without its vocabulary" in note for note in asked(model).notes), "it has no tokenizer"
    counted = asked(small)
    assert not any("without its vocabulary" in note for note in counted.notes)
    monkeypatch.setattr("bitwright.converter.advice.plans._LARGEST_TOKENIZER", 100)
    without = asked(small)
    assert any("tokenizer.json is larger than 100 B" in note for note in without.notes)
    sizes = [profiles(advice)["balanced-4bit"].file_bytes for advice in (counted, without)]
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize("name", ["deepseek_v2", "mixtral", "qwen3_next", "gemma4_text-small", "mamba2", "phi3"])
def test_a_directory_is_priced_without_transformers_as_with_it(name):
    checkpoint = open_checkpoint(str(tiny_models.checkpoint(name, ALL_TINY_MODELS[name])))
    described, profile = describe_for_directory(checkpoint), load_profile("fp8")
    plans = [
        plan_modules(profile, describe_modules(checkpoint, described, by_shape=by_shape), stored_dtypes(checkpoint))
        for by_shape in (False, True)
    ]
    assert plans[0].digest() == plans[1].digest()


@pytest.mark.parametrize("device", {device.architecture.name: device.name for device in devices()}.values())
def test_there_is_advice_for_every_architecture(small, device):
    advice = asked(small, hardware=device)
    assert advice.best is not None and advice.best.fits and advice.candidates[0] is advice.best
    for candidate in advice.candidates:
        assert candidate.decode is None or candidate.decode.low < candidate.decode.high
        assert candidate.step_seconds >= candidate.floor_seconds


def test_an_override_prices_one_plan(small):
    (plain,) = asked(small, profile="balanced-4bit").candidates
    (changed,) = asked(small, profile="balanced-4bit", overrides=["mlp_*=Q8_0"]).candidates
    assert changed.tensor_bytes > plain.tensor_bytes and changed.formats["ffn_up"] == ("Q8_0",)
    assert changed.command == f"bitwright --profile balanced-4bit --set 'mlp_*=Q8_0' {small}"
    assert "matches no tensor" in refused(
        "advise", small, "--hardware", "gb10", "--profile", "fp8", "--set", "nothing=FP8"
    )


def test_kernels_decide_what_is_offered(small):
    on_b300 = asked(small, hardware="B300")
    assert "smoothquant-w8a8" not in profiles(on_b300)
    assert "INT8" in next(entry.why for entry in on_b300.left_out if entry.profile == "smoothquant-w8a8")
    assert {candidate.runtime for candidate in asked(small, hardware="M2 Ultra").candidates} == {"llama.cpp"}
    assert profiles(asked(small, hardware="H100"))["nvfp4-vllm"].support == "weights"
    assert {c.runtime for c in asked(small, runtime="vllm").candidates} == {"vLLM"}


def test_keys_and_values_have_the_formats_of_the_runtime(small):
    sizes = {kv: profiles(asked(small, kv=kv, runtime="llama.cpp"))["balanced-4bit"] for kv in ("F16", "Q8_0", "Q4_0")}
    assert [sizes["F16"].kv_bytes * 17 / 32, sizes["F16"].kv_bytes * 9 / 32] == [
        sizes["Q8_0"].kv_bytes,
        sizes["Q4_0"].kv_bytes,
    ]
    assert sizes["Q8_0"].run == "-ctk q8_0 -ctv q8_0"
    advice = asked(small, kv="NVFP4")
    assert advice.best is None and "TensorRT-LLM" in advice.left_out[0].why
    assert profiles(asked(small))["fp8-kv"].kv == "FP8"
    assert profiles(asked(small, hardware="A100"))["fp8-kv"].kv == "BF16", "no kernel before Ada"


def test_heads_that_no_block_fits_stay_in_16_bits(tiny):
    assert "does not run with this model" in asked(tiny("llama"), kv="Q8_0").left_out[0].why


def test_a_cache_shrinks_until_it_fits(model):
    plain = profiles(asked(model, runtime="llama.cpp", context=32768))["balanced-4bit"]
    room = (1 << 30) + plain.file_bytes + plain.kv_bytes * 3 // 4
    smaller = profiles(asked(model, runtime="llama.cpp", context=32768, memory=room))["balanced-4bit"]
    assert (plain.kv, smaller.kv, smaller.fits) == ("F16", "Q8_0", True)


def test_what_does_not_fit_says_what_would(model):
    advice = asked(model, memory="6GiB", context=1 << 20)
    assert advice.best is None and advice.reason.startswith("nothing fits: the smallest, ")
    assert "with --context " in advice.reason
    assert "smaller model" in asked(model, memory="2GiB", context=1 << 20).reason


def test_longest_context_is_capped_by_the_model(model):
    assert {candidate.longest_context for candidate in asked(model).candidates} == {131072}


def test_several_gpus_share_a_model(model):
    one, four = (profiles(asked(model, hardware="RTX 4090", memory="8GiB", gpus=gpus)) for gpus in (1, 4))
    assert not one["fp16-baseline"].fits and four["fp16-baseline"].fits
    assert not one["fp8"].fits and four["fp8"].fits and four["fp8"].run == "--tensor-parallel-size 4"
    wide = {gpus: profiles(asked(model, hardware="RTX 4090", gpus=gpus)) for gpus in (1, 4)}
    for name in ("balanced-4bit", "fp8"):
        alone, shared = wide[1][name], wide[4][name]
        assert shared.decode.is_class and shared.decode.coverage is None and "not measured" in shared.decode.basis
        assert shared.decode.low <= alone.decode.low and shared.kv_bytes == alone.kv_bytes
        assert shared.prefill.low <= alone.prefill.low and shared.prefill.high > 2 * alone.prefill.high
    assert wide[4]["balanced-4bit"].floor_seconds == wide[1]["balanced-4bit"].floor_seconds, "layers take turns"
    assert wide[4]["fp8"].floor_seconds == pytest.approx(wide[1]["fp8"].floor_seconds / 4)
    assert wide[4]["fp8"].decode.high > wide[1]["fp8"].decode.high
    three = asked(model, hardware="RTX 4090", gpus=3)
    assert {candidate.runtime for candidate in three.candidates} == {"llama.cpp"}
    assert any("3 GPUs do not divide 32" in entry.why for entry in three.left_out)
    assert convert("advise", model, "--hardware", "RTX 4090", "--gpus", 2).stdout.startswith(
        "Llama-3.1-8B on 2 x RTX 4090 (48.0 GiB usable, 1008 GB/s stated each"
    )
    assert "--gpus 2" in refused("advise", model, "--hardware", "M2 Ultra", "--gpus", 2)


def test_a_speed_that_was_measured_is_in_its_range(model):
    """Also where no figure but a class was stated before."""
    for hardware, gpus in (("GB10", 1), ("RTX 4090", 4), ("DDR5-5600 desktop", 1)):
        candidate = profiles(asked(model, hardware=hardware, gpus=gpus, runtime="llama.cpp"))["balanced-4bit"]
        speed = 0.9 / candidate.step_seconds
        found = asked(model, hardware=hardware, gpus=gpus, runtime="llama.cpp", measured=f"balanced-4bit={speed}")
        decode = profiles(found)["balanced-4bit"].decode
        assert decode.low < speed < decode.high < 1.5 * decode.low and (decode.coverage is None) == (gpus > 1)


def test_a_measured_speed_narrows_the_range(model):
    before = profiles(asked(model))["balanced-4bit"]
    speed = before.decode.middle * 0.9
    after = profiles(asked(model, measured=f"balanced-4bit={speed}"))
    assert after["balanced-4bit"].decode.low < speed < after["balanced-4bit"].decode.high
    ratio = after["uniform-8bit"].step_seconds / profiles(asked(model))["uniform-8bit"].step_seconds
    assert ratio == pytest.approx(after["balanced-4bit"].step_seconds / before.step_seconds)
    assert profiles(asked(model))["fp8"].step_seconds == after["fp8"].step_seconds, "another runtime"
    with pytest.raises(ConvertError, match="more than the"):
        asked(model, measured="balanced-4bit=1e9")
    with pytest.raises(ConvertError, match="not among"):
        asked(model, measured="nothing=5")


def test_goals_that_nothing_meets_say_what_is_in_the_way(model):
    assert asked(model, target_speed=1.0).best is not None
    assert "out of reach" in asked(model, target_speed=1e9).reason
    advice = asked(model, max_kld=1e-9)
    assert advice.best.profile == "fp16-baseline", "16 bits diverge by nothing"
    nothing = asked(model, max_kld=0.01, profile="balanced-4bit")
    assert nothing.best is None and "bitwright --profile balanced-4bit" in nothing.reason


def test_few_bits_are_recommended_only_where_nothing_else_fits(model):
    advice = asked(model, memory="3.4GiB", runtime="llama.cpp")
    assert advice.best.profile.startswith("ultra-low") and "measured first" in advice.reason
    assert asked(model).best.bits_per_weight >= 4


@pytest.fixture(scope="module")
def converted(small, tmp_path_factory):
    """A directory with an artifact of the model and its work directory; the report."""
    directory = tmp_path_factory.mktemp("converted")
    text = {"calibration": "embedded", "samples": 128, "sequence_length": 16, "effort": "fast"}
    return directory, converter.convert(small, "uniform-8bit", directory / "m.gguf", quiet=True, device="cpu", **text)


PUBLISHED = """
import json, sys
from bitwright import converter
advice = converter.advise("org/tiny", "gb10", context=1024, runtime="llama.cpp", reports="org/tiny")
print(json.dumps({c.profile: [c.quality.kind, c.quality.kld, c.quality.source, c.quality.confidence, c.quality.text]
                  for c in advice.candidates}))
"""


def test_a_report_on_the_hub_is_of_the_same_commit(small, converted, tmp_path):
    """The reports of a repository that is named are read, no weights, and no other repository."""
    repository = tmp_path / "repository"
    shutil.copytree(small, repository)
    _, report = converted
    published = report | {"base_model": REPOSITORY, "revision": COMMIT, "recipe_directory": "recipe/m"}
    other = published | {"revision": "f" * 40, "profile": "balanced-4bit", "recipe_directory": "recipe/other"}
    for name, content in {"m": json.dumps(published), "other": json.dumps(other), "no": "{"}.items():
        (repository / "recipe" / name).mkdir(parents=True)
        (repository / "recipe" / name / "report.json").write_text(content)
    with serve(repository) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
        environment["HF_HUB_OFFLINE"] = "0"
        program = [sys.executable, "-c", PUBLISHED]
        ran = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
        found = json.loads(ran.stdout)
        assert not {name for name in server.downloaded() if name.endswith(".safetensors")}
    kind, kld, source, confidence, text = found["uniform-8bit"]
    assert (kind, kld, confidence) == ("published", report["quality"]["mean_kld"], "medium") and text.endswith("+")
    assert source == f"{REPOSITORY}@{COMMIT[:12]}: recipe/m/report.json"
    assert found["balanced-4bit"][0] == "not measured", "the report of another commit says nothing"


def test_a_local_model_has_no_reports_on_the_hub(small):
    with pytest.raises(ConvertError, match="this one is local"):
        asked(small, reports="org/name")
    with pytest.raises(ConvertError, match="no repository of the Hub"):
        asked(small, reports="https://example.com/org/name")


def test_a_report_of_this_plan_is_its_quality(small, converted, tmp_path):
    directory, report = converted
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    offered = profiles(asked(small, work_dir=tmp_path / "m.bitwright"))
    quality = offered["uniform-8bit"].quality
    assert quality.kind == "measured" and quality.kld == report["quality"]["mean_kld"]
    assert quality.confidence == "high" and quality.source.endswith("report.json")
    assert offered["balanced-4bit"].quality.kind == "not measured"
    assert "bitwright --profile balanced-4bit" in offered["balanced-4bit"].quality.source
    artifact = tmp_path / "m.gguf"
    arguments = ["--against", small, "--kv", "Q8_0", "--samples", 1, "--sequence-length", 32, "--device", "cpu"]
    evaluated = convert("evaluate", artifact, *arguments, "--text", "embedded", "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    kld = json.loads(evaluated.stdout)["mean_kld"]
    advice = asked(small, work_dir=tmp_path / "m.bitwright", kv="Q8_0", runtime="llama.cpp")
    own, other = (profiles(advice)[name] for name in ("uniform-8bit", "balanced-4bit"))
    assert own.kld == own.cache_quality.kld == kld and own.cache_quality.is_own
    assert own.cache_quality.source.endswith("quality-kv.json")
    assert other.cache_quality.kld == kld and not other.cache_quality.is_own and other.kld is None
    assert any(note.startswith("keys and values in Q8_0: mean KL divergence") for note in advice.notes)
    assert profiles(asked(small, work_dir=tmp_path / "m.bitwright", kv="Q4_0"))["uniform-8bit"].cache_quality is None
    content = artifact.read_bytes()
    artifact.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = convert("evaluate", artifact, *arguments[:2], "--kv", "Q4_0", *arguments[4:], "--text", "embedded")
    assert "not kept for bitwright advise: m.gguf is not what its report says" in changed.stderr
    (tmp_path / "m.bitwright" / "report.json").write_text("{}")
    again = profiles(asked(small, work_dir=tmp_path / "m.bitwright"))
    assert again["uniform-8bit"].quality.kind == "not measured", "it is not what was sealed"


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (("--hardware", "RTX 4095"), "--hardware"),
        (("--hardware", "gb10", "--kv", "Q5"), "--kv"),
        (("--hardware", "gb10", "--measured", "balanced-4bit"), "--measured"),
        (("--hardware", "gb10", "--memory", "lots"), "--memory"),
        (("--hardware", "gb10", "--attention", "fa3"), "--attention fa3"),
        (("--hardware", "gb10", "--set", "output=Q8_0"), "--set"),
        (("--hardware", "gb10", "--max-kld", "-1"), "--max-kld"),
        (("--hardware", "B300", "--profile", "smoothquant-w8a8"), "--profile smoothquant-w8a8"),
        (("--hardware", "gb10", "--profile", "importance-tiers"), "--profile importance-tiers"),
    ],
)
def test_what_cannot_be_advised_is_refused(small, options, where):
    assert f"where: {where}" in refused("advise", small, *options)


def test_a_model_that_embeds_has_no_speed(tiny):
    assert "embeds texts" in refused("advise", tiny("bert"), "--hardware", "gb10")


def test_this_machine_is_measured(model):
    device = this_machine(2)
    assert device.backend in ("cpu", "cuda") and 1e8 < device.bandwidth < 1e13 and device.memory > 1 << 28
    assert "measured" in device.sources["bandwidth"] or device.backend == "cuda"


@pytest.mark.parametrize(("value", "low", "high"), [(1400, 1000, 1500), (0.26, 0.2, 0.3), (7, 7, 7), (9.9, 7, 10)])
def test_classes_end_at_round_figures(value, low, high):
    assert round_down(value) == pytest.approx(low) and round_up(value) == pytest.approx(high)
    assert round_down(value) <= value <= round_up(value)


def test_convert_takes_the_profile_that_is_advised(small, tmp_path):
    arguments = [small, "--output", tmp_path / "m.gguf", "--advise", "M2 Max", "--judge", "off", "--effort", "fast"]
    text = ["--calibration", "embedded", "--samples", 128, "--sequence-length", 16]
    result = convert(*arguments, *text, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    best = asked(small, hardware="M2 Max").best
    assert report["profile"] == best.profile and f"{best.profile} for M2 Max: " in result.stderr
    assert report["machine"]["hardware"] == "M2 Max" and report["machine"]["low"] == best.decode.low
    page = (tmp_path / "m.bitwright" / "report.html").read_text()
    assert "On your machine" in page and "M2 Max in llama.cpp" in page
    assert "leave out one of the two" in refused(*arguments, "--profile", "fp16-baseline")
