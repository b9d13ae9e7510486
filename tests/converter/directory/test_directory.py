"""Safetensors directories: transformers loads and runs them, with the numbers that our own evaluation gives."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitwright import converter
from bitwright.calibration.control import PassControl
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.converter.cli import main
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.directory.encode import ModuleEncoder, StoredScales
from bitwright.converter.directory.files import stated_config
from bitwright.converter.directory.products import SchemeProducts
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.module_map import describe_modules, gguf_names, stored_dtypes
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.safetensors import read_headers
from bitwright.formats.schemes.registry import SCHEMES, Scheme
from bitwright.profiles.planning.plan_modules import plan_modules
from bitwright.profiles.reading.schema import load_profile
from tests import tiny_models
from tests.tiny_models import VOCAB_SIZE

SHORT = {"samples": 128, "sequence_length": 16, "calibration": "embedded", "judge": "off", "quiet": True}
TOKENS = np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 40))


def profile(path: Path, text: str) -> str:
    path.write_text(f'description = "d"\ngood_for = "g"\ntarget = "safetensors"\n{text}\n')
    return str(path)


def convert(model: Path, directory: Path, text: str, **options) -> tuple[Path, dict]:
    """The directory that a profile of this text makes of the model, and the report."""
    output = directory / "artifact"
    name = text if text.endswith("a8") or text in ("fp8", "fp8-kv", "w4a16") else profile(directory / "p.toml", text)
    return output, converter.convert(str(model), profile=name, output=output, **{**SHORT, **options})


def ours(artifact: Path, model: Path, work_dir: Path) -> np.ndarray:
    """float32 [2, 40, VOCAB_SIZE]: our own evaluation of the directory."""
    weights = DirectoryArtifact.of_recipe(artifact)
    streamable = StreamableModel(weights, model, device="cpu", threads=1, arithmetic=SchemeProducts(weights))
    stream = LayerStream(streamable, TOKENS, PassControl(work_dir))
    stream.run()
    with stream.head() as head, torch.inference_mode():
        return np.stack([head(stream.hidden_states(i, i + 1)[0]).numpy() for i in range(len(TOKENS))])


def theirs(directory: Path, dtype: torch.dtype = torch.float32, **options) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)
    with torch.inference_mode():
        logits = model(torch.from_numpy(TOKENS)).logits.float().numpy()
    written = model.generate(torch.from_numpy(TOKENS[:1, :8]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert written.shape == (1, 12)
    return logits


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a - b).sum() / np.square(b - b.mean()).sum())


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W8A16", "FP8", "FP8_BLOCK", "FP8_STATIC"])
def test_transformers_computes_to_the_bit_what_we_evaluate(tiny, tmp_path, scheme):
    model = tiny("llama-256")
    artifact, _ = convert(model, tmp_path, f'base = "{scheme}"')
    np.testing.assert_array_equal(ours(artifact, model, tmp_path / "work"), theirs(artifact))


def test_a_head_that_differs_from_a_tied_embedding_is_kept_and_stated(tmp_path):
    """vLLM reads no head of a model that is tied."""
    model = tmp_path / "model"
    tiny_models.build("qwen2", model)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    artifact, _ = convert(model, tmp_path, 'base = "W8A16"')
    assert json.loads((artifact / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in read_headers(artifact, "write it again")
    np.testing.assert_array_equal(ours(artifact, model, tmp_path / "work"), theirs(artifact))


def test_a_quantization_that_was_only_stated_is_stated_no_more(tiny):
    checkpoint = open_checkpoint(str(tiny("llama-256")))
    config = json.loads((checkpoint.location / "config.json").read_text())
    said = {"dtype": "bfloat16", "quantization_config": {"quant_method": "ours"}}
    assert stated_config(checkpoint, said)["quantization_config"] == {"quant_method": "ours"}
    with TemporaryDirectory() as copy:
        nested = {"text_config": {**config, "quantization_config": {"quant_method": "fp8"}}, "quantization_config": {}}
        (Path(copy) / "config.json").write_text(json.dumps(nested))
        stated = stated_config(replace(checkpoint, location=Path(copy)), said)
    assert "quantization_config" not in stated["text_config"]
    assert stated["quantization_config"] == {"quant_method": "ours"}
    assert stated["tie_word_embeddings"] is stated["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_weight_that_is_no_number_leaves_nothing_in_its_place(tmp_path, name):
    model = tmp_path / "model"
    tiny_models.build("llama-biases", model)
    weights = load_file(model / "model.safetensors")
    weights[name].view(-1)[5] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConvertError, match="the weight nan is not a finite number") as caught:
        convert(model, tmp_path, 'base = "W8A16"')
    assert f"tensor {name}, row 0, column 5" in caught.value.where
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC", "W8A8_STATIC_ASYM"])
def test_integer_products_differ_from_simulated_ones_by_their_rounding_alone(tiny, tmp_path, scheme):
    """transformers multiplies rounded floats: the sums differ in their last bits, and roundings after them flip."""
    model = tiny("llama-256")
    artifact, _ = convert(model, tmp_path, f'base = "{scheme}"')
    source, evaluated, simulated = theirs(model), ours(artifact, model, tmp_path / "work"), theirs(artifact)
    assert relative(evaluated, simulated) < 0.2 * relative(simulated, source)
    assert relative(evaluated, source) == pytest.approx(relative(simulated, source), rel=0.1)


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16"])
def test_fp4_differs_by_what_bfloat16_explains(tiny, tmp_path, scheme):
    """Of FP4, compressed-tensors decodes to bfloat16 only."""
    model = tiny("llama-256")
    artifact, _ = convert(model, tmp_path, f'base = "{scheme}"')
    in_bf16 = relative(theirs(model, torch.bfloat16), theirs(model))
    assert relative(ours(artifact, model, tmp_path / "work"), theirs(artifact, torch.bfloat16)) < 10 * in_bf16


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gemma3", "llama-biases"])
def test_every_architecture_smooths_loads_and_generates(tiny, tmp_path, name):
    model = tiny(name)
    artifact, report = convert(model, tmp_path, "smoothquant-w8a8")
    assert report["smoothing"]["groups"]
    source = theirs(model)
    assert relative(theirs(artifact), source) < 0.01
    assert relative(ours(artifact, model, tmp_path / "work"), source) < 0.01


def test_experts_load_where_transformers_reads_them(tiny, tmp_path):
    """FP8 and packed experts; of INT8 ones with rounded inputs it knows nothing, vLLM does."""
    model = tiny("qwen3_moe")
    artifact, _ = convert(model, tmp_path, "fp8")
    assert relative(theirs(artifact), theirs(model)) < 0.05
    names = set(DirectoryArtifact.of_recipe(artifact).tensors)
    assert "model.layers.0.mlp.experts.7.gate_proj.weight" in names


def test_smoothed_experts_load_and_generate(tiny, tmp_path):
    """W8A8 around experts in FP8, as transformers knows no INT8 ones: one factor for all experts and the router."""
    model = tiny("qwen3_moe")
    text = 'base = "W8A8"\n[[rule]]\nroles = ["expert_*"]\nformat = "FP8"\n[activations]\nsmooth = true'
    artifact, report = convert(model, tmp_path, text)
    folded = [group["name"] for group in report["smoothing"]["groups"]]
    assert sum("post_attention_layernorm" in name for name in folded) == 2
    router = "model.layers.1.mlp.gate.weight"
    assert relative(DirectoryArtifact.of_recipe(artifact).read(router), open_checkpoint(str(model)).read(router)) > 0.01
    source = theirs(model)
    assert relative(theirs(artifact), source) < 0.05
    assert relative(ours(artifact, model, tmp_path / "work"), source) < 0.05


def test_experts_that_are_stored_as_one_are_split(tiny, tmp_path):
    model = tmp_path / "fused"
    shutil.copytree(tiny("qwen3_moe"), model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    for path in model.glob("*.safetensors*"):
        path.unlink()
    loaded.save_pretrained(model, save_original_format=False)
    with safe_open(model / "model.safetensors", "pt") as file:
        assert len(file.get_slice("model.layers.0.mlp.experts.gate_up_proj").get_shape()) == 3
    whole, _ = convert(tiny("qwen3_moe"), tmp_path, "fp8")
    (tmp_path / "split").mkdir()
    split, _ = convert(model, tmp_path / "split", "fp8")
    assert (split / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_several_schemes_in_one_directory(tiny, tmp_path):
    model = tiny("llama-256")
    text = 'base = "FP8"\n[[rule]]\nroles = ["mlp_*"]\nformat = "W4A16_G32"\n[[rule]]\nroles = ["attention_output"]\n'
    artifact, _ = convert(model, tmp_path, text + 'layers = ["first:1"]\nformat = "BF16"')
    config = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and "model.layers.0.self_attn.o_proj" in config["ignore"]
    np.testing.assert_array_equal(ours(artifact, model, tmp_path / "work"), theirs(artifact))


def test_a_quantized_output_head_is_read(tiny, tmp_path):
    model = tiny("llama-256")
    text = 'base = "W4A16_G32"\n[[rule]]\nroles = ["output"]\nformat = "W4A16_G32"'
    artifact, _ = convert(model, tmp_path, text)
    assert DirectoryArtifact.of_recipe(artifact).tensors["lm_head.weight"][0] == "W4A16_G32"
    np.testing.assert_array_equal(ours(artifact, model, tmp_path / "work"), theirs(artifact))


def test_plan_and_files_agree_to_the_byte_and_shards_do(tiny, tmp_path):
    model = tiny("llama-256")
    arguments = ["--profile", "w4a16", "--split-size", "300K", "--judge", "off", "--output", str(tmp_path / "a")]
    arguments += ["--calibration", "embedded", "--samples", "128", "--sequence-length", "16", "--json", str(model)]
    planned = json.loads(CliRunner().invoke(main, ["plan", *arguments]).stdout)
    assert not (tmp_path / "a").exists()
    report = json.loads(CliRunner().invoke(main, arguments).stdout)
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sum(path.stat().st_size for path in shards) == planned["bytes"] == report["artifact"]["bytes"]
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    for path in shards:
        with safe_open(path, "pt") as file:
            assert {name for name, shard in index["weight_map"].items() if shard == path.name} == set(file.keys())
    assert theirs(tmp_path / "a").shape == (2, 40, VOCAB_SIZE)


def test_what_is_multiplied_as_one_shares_its_stored_scales(tiny, tmp_path):
    artifact, _ = convert(tiny("llama-256"), tmp_path, 'base = "NVFP4"')
    with safe_open(artifact / "model.safetensors", "np") as file:
        for scale in ("weight_global_scale", "input_global_scale"):
            for parts in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"):
                stored = {float(file.get_tensor(f"model.layers.1.{part}.{scale}")[0]) for part in parts}
                assert len(stored) == 1 and stored != {1.0}


def test_inputs_that_were_not_seen_have_no_scale(tiny):
    checkpoint = open_checkpoint(str(tiny("llama-256")))
    described = describe(checkpoint)
    plan = plan_modules(load_profile("FP8_STATIC"), describe_modules(checkpoint, described), stored_dtypes(checkpoint))
    row = next(row for row in plan.tensors if row.format == "FP8_STATIC")
    for ranges in ({}, {row.tensor.name: (0.0, 0.0)}, {row.tensor.name: (0.0, float("nan"))}):
        encoder = ModuleEncoder(checkpoint, plan, None, gguf_names(described), StoredScales(ranges, {}), 1)
        with pytest.raises(ConvertError, match="not seen in calibration") as raised:
            list(encoder.encode(row))
        assert row.tensor.name in raised.value.where and row.tensor.name in raised.value.remedy


def test_what_is_beside_the_weights(tiny, tmp_path):
    model = tiny("llama-256")
    artifact, report = convert(model, tmp_path, "fp8")
    config, source = (json.loads((d / "config.json").read_text()) for d in (artifact, model))
    assert {key: value for key, value in config.items() if key != "quantization_config"} == source
    assert config["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (artifact / name).read_bytes() == (model / name).read_bytes()
    recipe = json.loads((artifact / "bitwright.json").read_text())
    assert {file["path"] for file in recipe["files"]} == {p.name for p in artifact.iterdir()} - {"bitwright.json"}
    assert recipe["recipe"]["plan_sha256"] == report["plan_sha256"]


@pytest.mark.parametrize("name", ["llama-biases", "llama-tied"])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16", "W4A16_G32"])
def test_the_dtype_of_the_configuration_is_one_that_it_runs_in(tiny, tmp_path, name, scheme):
    """Of a source in float32 or float16: 16-bit matrices beside FP4, which decodes to bfloat16 only."""
    model = tiny(name)
    artifact, _ = convert(model, tmp_path, f'base = "{scheme}"')
    stated = json.loads((artifact / "config.json").read_text())["dtype"]
    kept = "float16" if name == "llama-tied" else "bfloat16"
    assert stated == (kept if scheme == "W4A16_G32" else "bfloat16")
    assert relative(theirs(artifact, "auto"), theirs(model)) < 0.5


def test_the_dtype_is_stated_wherever_it_was(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny("gemma3"), model)
    text = json.loads((model / "config.json").read_text())
    text["torch_dtype"] = text.pop("dtype")
    nested = {"model_type": "gemma3", "torch_dtype": "float32", "text_config": text}
    (model / "config.json").write_text(json.dumps(nested))
    artifact, _ = convert(model, tmp_path, "w4a16")
    config = json.loads((artifact / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"


def test_what_goes_with_a_model(tiny, tmp_path):
    """Licenses and all templates; nothing that only lies there."""
    model = tmp_path / "model"
    shutil.copytree(tiny("llama-256"), model)
    (model / "additional_chat_templates").mkdir()
    copied = {"LICENSE": "free", "LICENSE.md": "too", "NOTICE": "!", "chat_template.jinja": "{{ messages }}"}
    copied["additional_chat_templates/tool.jinja"] = "{{ tools }}"
    left = {"notes.json": "{}", "secrets.json": "{}", "other.jinja": "", "additional_chat_templates/x.txt": ""}
    for name, text in (copied | left).items():
        (model / name).write_text(text)
    artifact, _ = convert(model, tmp_path, "fp8")
    assert {name: (artifact / name).read_text() for name in copied} == copied
    assert not any((artifact / name).exists() for name in left)
    recipe = json.loads((artifact / "bitwright.json").read_text())
    assert copied.keys() <= {file["path"] for file in recipe["files"]}
    assert "tool" in transformers.AutoTokenizer.from_pretrained(artifact).chat_template


def test_a_link_out_of_the_model_is_not_followed(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny("llama-256"), model)
    (tmp_path / "diary").write_text("dear diary")
    (model / "LICENSE").symlink_to(tmp_path / "diary")
    with pytest.raises(ConvertError, match=r"a link to a place outside of the model\n  where: .*LICENSE"):
        convert(model, tmp_path, "fp8")
    assert not (tmp_path / "artifact").exists()


def test_links_inside_of_the_hubs_cache_are_files_of_the_model(tiny, tmp_path):
    repository = tmp_path / "models--org--name"
    model = repository / "snapshots" / "0123456789abcdef"
    shutil.copytree(tiny("llama-256"), model)
    (repository / "blobs").mkdir()
    for path in list(model.iterdir()):
        path.rename(repository / "blobs" / path.name)
        path.symlink_to(repository / "blobs" / path.name)
    artifact, _ = convert(model, tmp_path, "fp8")
    assert (artifact / "tokenizer.json").read_bytes() == (tiny("llama-256") / "tokenizer.json").read_bytes()
    assert not (artifact / "tokenizer.json").is_symlink()


def test_decoded_weights_equal_those_of_compressed_tensors(tiny, tmp_path):
    """Through its own decoder, in the dtype that the scales are stored in."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    artifact, _ = convert(tiny("llama-256"), tmp_path, 'base = "W4A16_ASYM_G64"')
    data = json.loads((artifact / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(data).config_groups.values()
    name = "model.layers.2.mlp.down_proj"
    with safe_open(artifact / "model.safetensors", "pt") as file:
        state = {key.rpartition(".")[2]: file.get_tensor(key) for key in file.keys() if key.startswith(name)}  # noqa: SIM118
    state["weight_scale"] = state["weight_scale"].float()
    decoded = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
    np.testing.assert_array_equal(DirectoryArtifact.of_recipe(artifact).read(f"{name}.weight"), decoded.float().numpy())


# Children are forked from a server that has imported everything and started nothing: a kill hits work, not imports.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        "bitwright.calibration.stream.forward",
        "bitwright.converter.pipeline",
        "bitwright.converter.directory.target",
        "torch",
    ]
)


def _convert_slowly(model: str, name: str, output: str, stop_at: int, fresh: bool = False) -> None:
    """A conversion that kills itself when so many modules are encoded, or while the directory is completed: before
    that, after it, when the old one has been moved away, and when the new one has taken its place."""
    from bitwright.converter.artifact import ownership
    from bitwright.converter.directory import files as directory
    from bitwright.converter.directory.encode import ModuleEncoder

    encoded, encode = [0], ModuleEncoder.encode

    def counting(self, planned):
        encoded[0] += 1
        if encoded[0] == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from encode(self, planned)

    ModuleEncoder.encode = counting
    if stop_at in (-3, -4):
        taken, step = {-3: (ownership.rename, "rename"), -4: (ownership.take_name, "take_name")}[stop_at]

        def killed_beside(source, target):
            taken(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(ownership, step, killed_beside)
    elif stop_at < 0:
        in_place = directory.put_in_place

        def killed(partial, output, replaceable):
            if stop_at == -2:
                in_place(partial, output, replaceable)
            os.kill(os.getpid(), signal.SIGKILL)

        directory.put_in_place = killed
    converter.convert(model, profile=name, output=output, fresh=fresh, **SHORT)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tiny, tmp_path):
    model = tiny("llama")
    name = profile(tmp_path / "p.toml", 'extends = "smoothquant-w8a8"\n[activations]\nkv_cache = "FP8"')
    whole = tmp_path / "artifact"
    converter.convert(str(model), profile=name, output=whole, **SHORT)
    output = tmp_path / "killed" / "artifact"
    for stop_at in (1, 7, 7, -1, -2):
        process = _PROCESSES.Process(target=_convert_slowly, args=(str(model), name, str(output), stop_at))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, stop_at
        assert output.exists() == (stop_at == -2)
    converter.convert(str(model), profile=name, output=output, **SHORT)
    assert {p.name: p.read_bytes() for p in output.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []


def test_what_fails_verification_does_not_get_its_name(tiny, tmp_path, monkeypatch):
    model, output = str(tiny("llama")), tmp_path / "artifact"
    decode, looked_at = Scheme.decode, []

    def broken(self, tensors, shape):
        looked_at.append(output.exists())
        return decode(self, tensors, shape) * np.float32(np.nan)

    with monkeypatch.context() as patched:
        patched.setattr(Scheme, "decode", broken)
        with pytest.raises(ConvertError, match="verification failed"):
            converter.convert(model, profile="fp8", output=output, **SHORT)
    assert looked_at and not any(looked_at) and not output.exists()
    converter.convert(model, profile="fp8", output=output, **SHORT)
    assert output.exists() and not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("stop_at", [-3, -4])
def test_a_replacement_that_was_killed_is_made_up_for(tiny, tmp_path, stop_at, fresh):
    model, output = str(tiny("llama")), tmp_path / "artifact"
    converter.convert(model, profile="fp8", output=output, **SHORT)
    whole = {path.name: path.read_bytes() for path in output.iterdir()}
    process = _PROCESSES.Process(target=_convert_slowly, args=(model, "fp8", str(output), stop_at, True))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    converter.convert(model, profile="fp8", output=output, fresh=fresh, **SHORT)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--profile", "fp8", "--target-size", "1M"], "makes a safetensors directory"),
        (["--profile", "fp8", "--lm-eval", "arc_easy"], "--lm-eval is for a GGUF"),
        (["--profile", "fp8", "--sensitivity", "s.safetensors"], "--sensitivity is for a GGUF"),
        (["--profile", "fp8", "--protect-super-weights", "pin"], "pin protects super weights in a GGUF"),
        (["--profile", "fp8", "--output", "x.gguf"], "--output is for a GGUF"),
        (["--profile", "fp8", "--set", "mlp_down=W8A9"], "unknown scheme 'W8A9'"),
        (["--profile", "fp8", "--set", "mlp_down=Q4_K"], "unknown scheme 'Q4_K'"),
        (["--profile", "fp8", "--set", "*=BF16"], "the plan quantizes nothing"),
        (["--profile", "smoothquant-w8a8", "--alpha", "1.5"], "alpha"),
    ],
)
def test_bad_options(tiny, options, what):
    failed = invoke("plan", *options, tiny("llama"))
    assert failed.exit_code == 1 and what in failed.stderr and "remedy: " in failed.stderr


@pytest.mark.parametrize("name", list(SCHEMES))
def test_every_scheme_is_a_profile(tiny, name):
    planned = invoke("plan", "--profile", name, "--json", tiny("llama-256"))
    assert planned.exit_code == 0, planned.stderr
    formats = {row["format"] for row in json.loads(planned.stdout)["tensors"]}
    assert name in formats


@pytest.mark.parametrize(
    ("options", "noted"),
    [
        (["--set", "*=FP8"], "FP8: every scale is measured at run time, so inputs are not looked at"),
        (["--set", "*=FP8", "--alpha", "0.5"], ""),
        (["--set", "mlp_down=FP8_STATIC"], ""),
        (["--set", "*=W4A16_ASYM_G32"], "transformers loads W4A16_ASYM_G32 with quantization_config="),
        (["--set", "*=W4A16_G32"], ""),
    ],
)
def test_notes_of_a_plan(tiny, options, noted):
    printed = " ".join(invoke("plan", "--profile", "fp8", *options, tiny("llama")).output.split())
    assert noted in printed
    assert ("not looked at" in printed) == ("not looked at" in noted)
    assert ("dequantize=True" in printed) == ("transformers loads" in noted)


def test_a_directory_that_is_there_is_not_replaced(tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    for fresh in ([], ["--fresh"]):
        failed = invoke("--profile", "fp8", "--judge", "off", *fresh, "--output", tmp_path / "mine", tiny("llama"))
        assert failed.exit_code == 1 and "the output exists" in failed.stderr
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"
    written = ["--profile", "fp8", "--judge", "off", "--output", tmp_path / "artifact", tiny("llama")]
    assert invoke(*written).exit_code == 0
    assert "already done" in invoke(*written).stderr
    assert invoke("--fresh", *written).exit_code == 0
    changed = tmp_path / "artifact" / "config.json"
    changed.write_text(changed.read_text() + " ")
    failed = invoke(*written)
    assert failed.exit_code == 1 and "removed or changed since" in failed.stderr


def test_commands_read_a_directory(tiny, tmp_path):
    model = tiny("llama-256")
    artifact, report = convert(model, tmp_path, "fp8")
    data = json.loads(invoke("inspect", artifact, "--json").stdout)
    assert sum(t["bytes"] for t in data["tensors"]) < data["bytes"] == report["artifact"]["bytes"]
    rows = json.loads(invoke("verify", artifact, "--against", model, "--json").stdout)
    assert [row["relative_error"] for row in rows] == [error["relative_error"] for error in report["errors"]]
    other = invoke("verify", artifact, "--against", tiny("qwen2"))
    assert other.exit_code == 1 and "of another model" in other.stderr
    unread = invoke("inspect", model)
    assert unread.exit_code == 1 and "bitwright.json" in unread.stderr


def test_the_report_has_what_a_gguf_s_has(tiny, tmp_path):
    model = tiny("llama-256")
    _, report = convert(model, tmp_path, "smoothquant-w8a8", judge="full", sequence_length=32)
    assert report["quality"]["mean_kld"] < 0.05 and report["verdict"] in ("near-lossless", "good")
    assert report["coherence"]["runtime"].startswith("transformers, with the products")
    assert {group["layer"] for group in report["smoothing"]["groups"]} == set(range(4))
    assert report["activations"] and Path(report["page"]).read_text().startswith("<!")
    assert open_checkpoint(str(model)).model_id == report["model"]
