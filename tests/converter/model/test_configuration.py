"""config.json: what transformers reads of it reaches llama.cpp, or is named; and nothing in it ends in a traceback."""

import ast
import copy
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFValueType

from bitwright.converter.architectures.architecture import architectures
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.converter.tokenizer.vocabulary import TokenizerMetadata
from bitwright.formats.errors import ConvertError
from bitwright.profiles.vocabulary import ModelMap
from tests.converter.model.variants import (
    OPTIONS,
    WITHOUT,
    edit_json,
    errors_of_rows,
    llama_cpp_logits,
    tokens,
    transformers_logits,
    write_variant,
)

WINDOW = 32


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Hundreds of tiny forward passes: threads would wait for each other for most of the time."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {}),
    "mistral, a switch without effect": ("Mistral", {"use_sliding_window": False}),
    "mistral, one layer": ("Mistral", {"layer_types": ["full_attention", "sliding_attention"]}),
    "mixtral": ("Mixtral", {}),
    "mixtral, layers without effect": ("Mixtral", {"layer_types": ["full_attention"] * 2}),
    "phi3": ("Phi3", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 0, "layer_types": WITHOUT}),
    "qwen2, the last layer": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}),
    "qwen2, by layers": (
        "Qwen2",
        {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "max_window_layers": 0, "layer_types": WITHOUT}),
    "qwen3_moe": ("Qwen3Moe", {"use_sliding_window": True}),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_the_context_ends_where_llama_cpp_leaves_the_window(name: str, tmp_path: Path) -> None:
    architecture, edits = WINDOWED[name]
    directory = write_variant(tmp_path / "model", architecture, {"sliding_window": WINDOW, **edits})
    model_map = describe(open_checkpoint(str(directory)))
    assert model_map.metadata[f"{model_map.architecture}.context_length"].value == WINDOW
    assert f"a sliding window of {WINDOW} tokens" in model_map.notes[0]
    n = WINDOW + 8
    errors = errors_of_rows(llama_cpp_logits(directory, n, 256), transformers_logits(directory, n))
    assert errors[:WINDOW].max() < 1e-4
    assert errors[WINDOW] > 1e-3


@pytest.mark.parametrize(
    ("architecture", "edits"),
    [
        ("Llama", {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 2}),
        ("Mistral", {"sliding_window": None}),
        ("Mistral", {"sliding_window": WINDOW, "layer_types": ["full_attention"] * 2}),
        ("Qwen2", {"sliding_window": WINDOW, "use_sliding_window": False}),
        ("Qwen2", {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}),
        ("Qwen3", {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": WITHOUT}),
        ("Qwen3Moe", {"sliding_window": WINDOW, "use_sliding_window": WITHOUT}),
    ],
)
def test_without_a_window_the_whole_context_is_right(architecture: str, edits: dict[str, Any], tmp_path: Path) -> None:
    directory = write_variant(tmp_path / "model", architecture, edits)
    model_map = describe(open_checkpoint(str(directory)))
    assert model_map.metadata[f"{model_map.architecture}.context_length"].value == 1024
    assert not any("window" in note for note in model_map.notes)
    n = 2 * WINDOW
    assert errors_of_rows(llama_cpp_logits(directory, n, 256), transformers_logits(directory, n)).max() < 1e-4


def test_a_window_that_is_not_named_is_that_of_transformers(tmp_path: Path) -> None:
    edits = {"sliding_window": WITHOUT, "max_position_embeddings": 32768}
    model_map = describe(open_checkpoint(str(write_variant(tmp_path / "model", "Mistral", edits))))
    assert model_map.metadata["llama.context_length"].value == 4096


@pytest.mark.parametrize(
    "edits",
    [
        {"layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "full", "full", "sliding", "sliding")]},
        {"layer_types": ["sliding_attention"] * 6},
        {"layer_types": ["full_attention"] * 6},
        {"layer_types": WITHOUT, "sliding_window_pattern": 3},
        {"layer_types": WITHOUT, "sliding_window_pattern": 1},
    ],
)
def test_llama_cpp_is_told_which_layers_of_gemma_have_a_window(edits: dict[str, Any], tmp_path: Path) -> None:
    directory = write_variant(tmp_path / "model", "Gemma3", edits)
    assert not any("window" in note for note in describe(open_checkpoint(str(directory))).notes)
    assert errors_of_rows(llama_cpp_logits(directory, 100, 256), transformers_logits(directory, 100)).max() < 1e-3


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"sliding_window": 0}, "gives sliding_window = 0, which is no size"),
        ({"sliding_window": None}, "the configuration has no window"),
        ({"layer_types": ["full_attention"] * 5}, "which is no list of 6"),
        ({"layer_types": "full_attention"}, "which is no list of 6"),
        ({"layer_types": ["full_attention"] * 5 + ["chunked_attention"]}, "layer_types has 'chunked_attention'"),
        ({"layer_types": [["full_attention"]] * 6}, "layer_types has"),
        ({"layer_types": None, "sliding_window_pattern": 0}, "gives sliding_window_pattern = 0"),
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 32 only"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping = False only"),
    ],
)
def test_what_llama_cpp_does_not_compute_of_gemma(edits: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = write_variant(tmp_path / "model", "Gemma3", edits)
    with pytest.raises(ConvertError, match=message):
        describe(open_checkpoint(str(directory)))


def test_the_scale_of_gemma_with_62_layers_is_that_of_the_27b(tmp_path: Path) -> None:
    options = {"num_hidden_layers": 62, "intermediate_size": 32}
    right = write_variant(tmp_path / "right", "Gemma3", {}, query_pre_attn_scalar=16, **options)
    assert errors_of_rows(llama_cpp_logits(right, 40, 256), transformers_logits(right, 40)).max() < 2e-3
    edit_json(right / "config.json", {"query_pre_attn_scalar": 32})  # of a head, as all others have it
    with pytest.raises(ConvertError, match="query_pre_attn_scalar = 16 only"):
        describe(open_checkpoint(str(right)))


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Mixtral"])
def test_heads_of_any_width(architecture: str, tmp_path: Path) -> None:
    directory = write_variant(tmp_path / "model", architecture, {}, head_dim=24)
    assert errors_of_rows(llama_cpp_logits(directory, 40, 256), transformers_logits(directory, 40)).max() < 1e-4


@pytest.mark.parametrize("architecture", ["Qwen2", "Phi3"])
def test_heads_whose_width_llama_cpp_takes_for_granted(architecture: str, tmp_path: Path) -> None:
    directory = write_variant(tmp_path / "model", architecture, {}, head_dim=24)
    with pytest.raises(ConvertError, match="with hidden_size = 96 only"):
        describe(open_checkpoint(str(directory)))


def test_biases_that_the_configuration_denies(tmp_path: Path) -> None:
    directory = write_variant(tmp_path / "model", "Llama", {"attention_bias": False}, attention_bias=True)
    with pytest.raises(ConvertError, match="attention_bias = False: transformers computes without it"):
        describe(open_checkpoint(str(directory)))


def test_biases_that_the_configuration_promises(tmp_path: Path) -> None:
    directory = write_variant(tmp_path / "model", "Llama", {"mlp_bias": True})
    with pytest.raises(ConvertError, match=r"lacks .*mlp\.(gate|up|down)_proj\.bias"):
        describe(open_checkpoint(str(directory)))


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"num_local_experts": 4, "num_experts": 8}, "num_local_experts = 4 and num_experts = 8"),
        ({"num_local_experts": WITHOUT, "num_experts": 4}, ""),
        ({"num_local_experts": 4, "num_experts": 4}, ""),
    ],
)
def test_both_names_of_the_number_of_experts(edits: dict[str, Any], said: str, tmp_path: Path) -> None:
    directory = write_variant(tmp_path / "model", "Mixtral", edits)
    if said:
        with pytest.raises(ConvertError, match=said):
            describe(open_checkpoint(str(directory)))
    else:
        assert transformers.AutoConfig.from_pretrained(directory).num_local_experts == 4
        assert describe(open_checkpoint(str(directory))).metadata["llama.expert_count"].value == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("attention_bias", value) for value in ("true", 1, 0, None)),
        *(("tie_word_embeddings", value) for value in ("false", 1, None)),
        *((key, None) for key in ("rms_norm_eps", "rope_theta", "hidden_act", "max_position_embeddings")),
    ],
)
def test_what_transformers_refuses_of_switches_and_null(key: str, value: Any) -> None:
    directory, checkpoint, _, _ = base_model("Llama")
    config = json.loads((directory / "config.json").read_text()) | {key: value}
    if key == "rope_theta":
        del config["rope_parameters"]
    assert logits_with("Llama", config) is None
    with pytest.raises(ConvertError) as caught:
        describe(replace(checkpoint, config=config))
    assert key in str(caught.value)


# --- every attribute that transformers reads ---

MODEL_TYPES = {"Gemma3": "gemma3", "Qwen3Moe": "qwen3_moe"} | {
    name: name.lower() for name in OPTIONS if name not in ("Gemma3", "Qwen3Moe")
}
# Read by code of all architectures.
_SHARED = ("masking_utils.py", "modeling_rope_utils.py")
# Tables have tests of their own (test_rope.py).
_TABLES = {"rope_parameters"}
# What an attribute may have been set to, by what it is.
_OTHERS: dict[type, list[Any]] = {
    bool: [],
    int: [],
    float: [],
    str: ["gelu"],
    type(None): [True, 3, 0.37, ["sliding_attention"] * 2],
    list: [[0], ["sliding_attention"] * 2],
}


def attributes_read(model_type: str) -> set[str]:
    """Names that transformers' code of this architecture, and the code that all share, reads of a configuration."""
    root = Path(transformers.__file__).parent
    folder = root / "models" / model_type
    files = [folder / f"modeling_{model_type}.py", folder / f"configuration_{model_type}.py"]
    names: set[str] = set()
    for path in [*files, *(root / name for name in _SHARED)]:
        for node in ast.walk(ast.parse(path.read_text())):
            owner: ast.expr | None = None
            if isinstance(node, ast.Attribute):
                owner, name = node.value, node.attr
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
                owner, name = node.args[0], ast.literal_eval(node.args[1]) if _is_text(node.args[1]) else ""
            said = "" if owner is None else ast.unparse(owner)
            if said.endswith("config") or (said == "self" and path == files[1]):
                names.add(name)
    return {name for name in names if name and not name.startswith("_")} - _TABLES


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@cache
def base_model(architecture: str) -> tuple[Path, Checkpoint, ModelMap, transformers.PreTrainedModel]:
    """With a window where there may be one, so that it tells, and what is made of it."""
    options: dict[str, Any] = {"num_hidden_layers": 2}
    if "sliding_window" in OPTIONS[architecture]:
        options["sliding_window"] = WINDOW
    directory = write_variant(Path(mkdtemp()) / "model", architecture, {}, **options)
    checkpoint = open_checkpoint(str(directory))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return directory, checkpoint, describe(checkpoint), model


def logits_with(architecture: str, config: dict[str, Any]) -> np.ndarray | None:
    """transformers' logits of the base model's weights under this configuration; None where it refuses."""
    model = base_model(architecture)[3]
    try:
        with transformers.initialization.no_init_weights():
            changed = type(model)(type(model.config).from_dict(copy.deepcopy(config))).eval()
        if changed.load_state_dict(model.state_dict(), strict=False).missing_keys:
            return None
        with torch.inference_mode():
            return changed(torch.tensor([tokens(2 * WINDOW)])).logits[0].numpy()
    except Exception:  # whatever its checks and its code make of a senseless value
        return None


def changed_values(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (2 * value, value - 1)
    elif isinstance(value, float):
        yield value + 0.1
    yield from _OTHERS.get(type(value), [])


@pytest.mark.parametrize("architecture", OPTIONS)
def test_whatever_changes_transformers_logits_is_written_or_refused(architecture: str) -> None:
    directory, checkpoint, described, _ = base_model(architecture)
    config = json.loads((directory / "config.json").read_text())
    expected = logits_with(architecture, config)
    assert expected is not None
    compared = 0
    for name in sorted(attributes_read(MODEL_TYPES[architecture])):
        for value in changed_values(config.get(name)):
            found = logits_with(architecture, {**config, name: value})
            if found is None:
                continue
            compared += 1
            if errors_of_rows(found, expected).max() < 1e-5:
                continue
            try:
                ours = describe(replace(checkpoint, config={**config, name: value}))
            except ConvertError:
                continue
            assert (ours.metadata, ours.tensors) != (described.metadata, described.tensors), (name, value)
    assert compared > 10


# Key of a data file -> why transformers' class has another value, or none.
OF_CLASSES = {
    ("cohere2_moe", "first_k_dense_replace"): "transformers fills mlp_layer_types with it",
    ("embeddinggemma", "use_bidirectional_attention"): "by which the file is chosen",
    ("ernie4_5_moe", "moe_layer_end_index"): "-1, which transformers resolves",
    ("gemma3n", "intermediate_size"): "a number for all layers, which transformers repeats",
    ("gemma4", "global_head_dim"): "transformers puts it into per_layer_config",
    ("gemma4_unified", "global_head_dim"): "transformers puts it into per_layer_config",
    ("gpt_oss", "rope_parameters"): "without the base, which has a key of its own",
    ("jamba", "mamba_dt_rank"): '"auto", which transformers resolves',
    ("kimi_linear", "first_k_dense_replace"): "transformers fills mlp_layer_types with it",
    ("mamba", "time_step_rank"): '"auto", which transformers resolves',
    ("nemotron_h_moe", "num_experts"): "the usual name of n_routed_experts",
    **dict.fromkeys(
        [(name, "full_attention_interval") for name in ("qwen3_5", "qwen3_5_moe", "qwen3_next")],
        "transformers fills layer_types with it",
    ),
}


@pytest.mark.parametrize("architecture", architectures(), ids=lambda architecture: architecture.name)
def test_defaults_are_those_of_transformers(architecture: Any) -> None:
    whole = config_class_of(architecture)
    config = whole.get_text_config()
    own_names = {usual: own for own, usual in architecture.aliases.items()}
    tables = getattr(config, "rope_parameters", None) or {}
    full = tables.get("full_attention", tables)
    theirs = {
        "rope_theta": full.get("rope_theta"),
        "rope_local_base_freq": tables.get("sliding_attention", {}).get("rope_theta"),
        "sliding_window_pattern": theirs_pattern(config),
        "partial_rotary_factor": full.get("partial_rotary_factor", 1.0),
    }
    if "use_sliding_window" in architecture.defaults:  # kept from the configuration while it is switched off
        theirs["sliding_window"] = 4096

    stated = whole.to_dict() | {key: value for key, value in config.to_dict().items() if value is not None}

    def of_theirs(key: str) -> Any:
        names = [name for name in (own_names.get(key, key), key) if name in stated]
        if theirs.get(key) is not None or not names:
            return theirs[key] if theirs.get(key) is not None else getattr(config, key, None)
        return stated[names[0]]

    differing = {key for key, value in architecture.defaults.items() if of_theirs(key) != value}
    for key, required in architecture.requires.items():
        if key not in architecture.defaults and (of_theirs(key) or False) != (required or False):
            differing.add(key)  # taken for granted where the configuration does not say
    assert differing == {key for name, key in OF_CLASSES if name == architecture.name}


def config_class_of(architecture: Any) -> Any:
    """transformers' configuration, without any values stated."""
    for model_type in architecture.model_types:
        if model_type in transformers.CONFIG_MAPPING:
            return transformers.AutoConfig.for_model(model_type)
    raise AssertionError(f"transformers has none of {architecture.model_types}")


def theirs_pattern(config: Any) -> int | None:
    types = getattr(config, "layer_types", None) or []
    return types.index("full_attention") + 1 if "sliding_attention" in types else None


# --- values of any kind ---

_SENSELESS: list[Any] = [
    *("", "silu", [], [1], {}, {"rope_type": ["yarn"]}, [[]] * 2, True, 0, -1, 7, 0.5, 1e300, 1e-300, 10**400),
    *(2**33, 10**12, 2**31 - 1, float("inf"), float("-inf"), float("nan")),
]
_KEYS_OF_TABLES = (
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("low_freq_factor", "high_freq_factor", "long_factor", "short_factor"),
)
_TABLES_OF_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("Llama", {"factor": 4.0, "original_max_position_embeddings": 64}),
    "llama3": ("Llama", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "longrope": ("Phi3", {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}),
}


def check_described(checkpoint: Checkpoint, config: dict[str, Any], keys: tuple[str, ...]) -> None:
    """It is described in numbers that a GGUF holds, or refused with an error that names one of the keys."""
    try:
        described = describe(replace(checkpoint, config=config))
    except ConvertError as error:
        assert error.where.startswith(f"{checkpoint.location}"), error
        assert any(key in str(error) for key in keys), error
        return
    packed = {GGUFValueType.UINT32: "<I", GGUFValueType.FLOAT32: "<f"}
    for value in described.metadata.values():
        if value.type in packed:
            assert np.isfinite(struct.unpack(packed[value.type], struct.pack(packed[value.type], value.value))[0])
    for spec in described.tensors:
        assert np.isfinite(spec.constant).all() and all(value > 0 for value in spec.constant)


@pytest.fixture(autouse=True)
def without_tokenizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of any kind are thousands: the tokenizer, which no key here is about, is left out of them."""
    if "senseless" in request.node.name:
        monkeypatch.setattr(
            "bitwright.converter.model.model_map.tokenizer_metadata", lambda *_: TokenizerMetadata({}, ())
        )


@pytest.mark.parametrize("architecture", OPTIONS)
def test_senseless_values_are_named(architecture: str) -> None:
    directory, checkpoint, _, _ = base_model(architecture)
    config = json.loads((directory / "config.json").read_text())
    keys = set(config) | attributes_read(MODEL_TYPES[architecture]) | {"rope_scaling", "rope_theta", "head_dim"}
    keys -= {"text_config", "vision_config", "per_layer_config"}
    for key in sorted(keys):
        for value in _SENSELESS:
            check_described(
                checkpoint, {**config, key: value}, (key, "has the shape", "lacks the tensor", "dimension", "rope_type")
            )


@pytest.mark.parametrize("kind", _TABLES_OF_TYPES)
def test_senseless_values_of_rope_tables_are_named(kind: str) -> None:
    architecture, parameters = _TABLES_OF_TYPES[kind]
    directory, checkpoint, _, _ = base_model(architecture)
    config = json.loads((directory / "config.json").read_text())
    for key in _KEYS_OF_TABLES:
        for value in _SENSELESS:
            stated = {"rope_type": kind, "rope_theta": 1e4, **parameters, key: value}
            check_described(checkpoint, {**config, "rope_parameters": stated}, (key, "rope"))


def test_infinity_in_the_file_is_named(tmp_path: Path) -> None:
    directory = write_variant(tmp_path / "model", "Llama", {"vision_config": {"scales": [1.0, float("inf")]}})
    assert "Infinity" in (directory / "config.json").read_text()
    with pytest.raises(ConvertError, match=r"gives vision_config\.scales = inf, which is no number"):
        describe(open_checkpoint(str(directory)))
