"""Names of artifacts as the ecosystem reads them. The rules are written down here anew, as each program has them."""

import re
from pathlib import Path

import pytest
from gguf import LlamaFileType

from bitwright.converter.artifact.naming import directory_name, file_type, labelled, mix_of_file, tag_of, unique_tag
from bitwright.converter.report.data import Artifact, ArtifactFile
from bitwright.converter.report.run_lines import hub_lines, local_lines
from bitwright.profiles.mixes import MIXES
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.labels import expected_mix, mix_bits, mix_of
from bitwright.profiles.reading.rules import parse_override
from bitwright.profiles.reading.schema import load_profile, preset_names, profile_names
from tests.converter.runs import run_of
from tests.profiles.models import evidence, model_map

MODEL = "Llama-3.2-1B-Instruct"

# packages/tasks/src/gguf.ts of huggingface.js: names of GGMLFileQuantizationType in their order, by which the regular
# expression prefers the first that matches at a place.
HUB_NAMES = """
F32 F16 Q4_0 Q4_1 Q4_1_SOME_F16 Q4_2 Q4_3 Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K
IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8
TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0 Q2_0 Q2_K_XL Q3_K_XL Q4_K_XL Q5_K_XL Q6_K_XL Q8_K_XL
""".split()  # noqa: SIM905
HUB_LABEL = re.compile(rf"(?:UD-)?(?:{'|'.join(HUB_NAMES)})(?:_[A-Z]+)?")
HUB_MIXTURE = re.compile(r"(?:^|(?<=-))\d{1,3}(?:[A-Z]+\d+(?:_[A-Z0-9]+)*)(?=$|[-.])")


def hub_label(file_name: str) -> str | None:
    """parseGGUFQuantLabel: the last one of the name."""
    return ([None, *(match[0] for match in HUB_LABEL.finditer(file_name.upper()))])[-1]


def found_by_llama_cpp(tag: str, names: list[str]) -> list[str]:
    """find_best_model of common/download.cpp: what `-hf repo:TAG` takes, of files in this order; all of them here."""
    words = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
    models = [name for name in names if name.endswith(".gguf") and not any(w in name.split("/")[-1] for w in words)]
    first = [name for name in models if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", name)]
    return [name for name in first if re.search(f"{tag}[.-]", name, re.IGNORECASE)]


def gguf_presets() -> list[str]:
    return [name for name in preset_names() if load_profile(name).target == "gguf"]


def aimed(name: str):
    profile = load_profile(name)
    return profile if profile.base is not None else profile.aiming_at(None, 2.4, None, "test")


@pytest.mark.parametrize("shard", ["", "-00001-of-00003"])
@pytest.mark.parametrize("profile", gguf_presets())
def test_the_label_of_every_preset_is_read_by_all(profile, shard):
    mix = expected_mix(aimed(profile), model_map())
    name = labelled({}, MODEL, mix).replace(".gguf", f"{shard}.gguf")
    assert name == f"{MODEL}-BW-{mix}{shard}.gguf"
    assert hub_label(name) == mix in HUB_NAMES  # the Hub, and Ollama, which asks the Hub
    assert not HUB_MIXTURE.search(name.removesuffix(".gguf"))
    assert tag_of(name) == mix
    others = [name.replace("00001", "00002")] if shard else []
    files = [name, *others, f"recipe/{MODEL}-BW-{mix}/{MODEL}.imatrix.gguf", "mmproj-F16.gguf"]
    assert found_by_llama_cpp(mix, files) == [name]
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", mix)  # a tag of Ollama's
    assert "." not in mix


def test_labels_tell_sizes():
    """A preset is called after what people would call a file of its size."""
    expected = {
        "balanced-4bit": "Q4_K_S",
        "fp16-baseline": "F16",
        "uniform-8bit": "Q8_0",
        "ternary": "TQ2_0",
        "nvfp4-gguf": "NVFP4",
        "importance-tiers": "Q8_0",
    }
    for name, mix in expected.items():
        assert expected_mix(load_profile(name), model_map()) == mix, name


@pytest.mark.parametrize(
    ("goal", "mix"),
    [
        ((None, 2.7, None), "IQ2_M"),
        ((None, 4.9, None), "Q4_K_M"),
        ((None, 8.5, None), "Q8_0"),
        ((None, None, 0.03), "Q4_K_M"),
        ((None, None, 0.001), "Q8_0"),
    ],
)
def test_the_label_of_a_goal(goal, mix):
    """Names and general.file_type are decided apart, the one before the measurement and the other by the plan."""
    profile, of = load_profile("budget").aiming_at(*goal, "test"), model_map(width=1024)
    assert expected_mix(profile, of) == mix
    assert mix_of(assign(profile, of, evidence=evidence(of))) == mix


def test_the_label_of_a_size_is_that_of_the_mix_of_this_size():
    of = model_map(width=1024)
    n_weights = sum(tensor.n_weights for tensor in of.tensors)
    sizes = {mix: round(mix_bits(mix, of.tensors) * n_weights / 8) for mix in MIXES}
    for mix, size in sizes.items():
        assert expected_mix(load_profile("budget").aiming_at(size, None, None, "test"), of) == mix


def test_a_mix_of_llama_3_1_8b_has_its_bits():
    """Where the embeddings and the output have the shares that they have there."""
    of = model_map(width=1024)
    layers = sum(t.n_weights for t in of.tensors if t.quantizable and t.layer is not None)
    n_rows = round(layers / 6.98 * 0.525 / 1024)
    tensors = [
        t.__class__(t.name, (n_rows, 1024), t.role) if t.layer is None else t for t in of.tensors if t.quantizable
    ]
    for name, mix in MIXES.items():
        assert mix_bits(name, tensors) == pytest.approx(mix.bits, abs=0.02), name


def test_one_format_throughout_has_its_name():
    for chosen, mix in (("Q4_K", "Q4_K_S"), ("MXFP4", "MXFP4_MOE"), ("IQ4_NL", "IQ4_NL"), ("F32", "F32")):
        profile, overrides = load_profile("uniform-8bit"), [parse_override(f"*={chosen}", "gguf")]
        assert expected_mix(profile, model_map(), overrides) == mix
        assert mix_of_file({"general.file_type": file_type(mix).value}) == mix


def test_file_types_are_those_of_llama_cpp():
    assert all(file_type(mix) is not LlamaFileType.GUESSED for mix in MIXES)
    assert file_type("Q4_K_M").value == 15
    assert mix_of_file({"general.file_type": LlamaFileType.GUESSED.value}) is None
    assert mix_of_file({}) is None


@pytest.mark.parametrize(
    ("profile", "ending"),
    [
        ("smoothquant-w8a8", "quantized.w8a8"),
        ("w4a16", "quantized.w4a16"),
        ("W4A16_G64", "quantized.w4a16-g64"),
        ("fp8", "FP8-dynamic"),
        ("FP8_STATIC", "FP8"),
        ("FP8_BLOCK", "FP8-block"),
        ("fp8-kv", "FP8-dynamic-FP8-KV"),
        ("NVFP4", "NVFP4"),
    ],
)
def test_directories_are_called_as_people_call_them(tiny, tmp_path, profile, ending):
    run = run_of(tiny("llama"), tmp_path)
    name = directory_name(run.checkpoint, run.model_map, load_profile(profile))
    assert name.endswith(f"-{ending}") and "BW" not in name


def test_every_directory_has_a_name(tiny, tmp_path):
    run = run_of(tiny("llama"), tmp_path)
    profiles = [profile for name in profile_names() if (profile := load_profile(name)).target == "safetensors"]
    assert all(re.fullmatch(r"[\w.-]+", directory_name(run.checkpoint, run.model_map, each)) for each in profiles)


@pytest.mark.parametrize("word", ["imatrix", "mmproj", "mtp-", "eagle3-"])
def test_a_model_with_a_reserved_word_in_its_name_stays_a_model(word):
    name = labelled({}, f"Foo-{word}1B", "Q8_0")
    assert found_by_llama_cpp("Q8_0", [name]) == [name]


def test_a_tag_that_finds_another_file_is_not_given():
    bf16, f16 = "M-BW-BF16.gguf", "M-BW-F16.gguf"
    assert found_by_llama_cpp("F16", [bf16, f16]) == [bf16, f16]
    assert unique_tag(f16, [bf16, f16]) is None and unique_tag(bf16, [bf16, f16]) == "BF16"
    artifact = Artifact("gguf", 1, (ArtifactFile(f16, 1, ""),))
    assert hub_lines("me/m", artifact, [f16, bf16])[0] == "llama-server -hf me/m --hf-file M-BW-F16.gguf"
    assert hub_lines("me/m", artifact, [f16]) == [
        "llama-server -hf me/m:F16",
        "ollama run hf.co/me/m:F16",
        "lms get https://huggingface.co/me/m@F16",
    ]


def test_what_runs_an_artifact_that_lies_here():
    directory = Artifact("safetensors", 1, (ArtifactFile("here/M-NVFP4/model.safetensors", 1, ""),))
    assert local_lines(directory, directory.location) == ["vllm serve here/M-NVFP4"]
    assert hub_lines("me/M-NVFP4", directory, []) == ["vllm serve me/M-NVFP4"]
    shards = tuple(ArtifactFile(f"a b/M-{i}-of-00002.gguf", 1, "") for i in ("00001", "00002"))
    of_shards, first = Artifact("gguf", 1, shards), Path("a b/M-00001-of-00002.gguf")
    assert local_lines(of_shards, of_shards.location) == [f"llama-server -m '{first}'"]
    assert local_lines(Artifact("gguf", 1, shards[:1]), first)[2] == f"lms import '{first}'"
