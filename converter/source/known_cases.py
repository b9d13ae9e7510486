"""Checkpoints that are something else than a causal language model in transformers' own layout: what they are, and the
command that mends them. One line of a table for each kind, found by the names of files or tensors."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from bitwright.formats.errors import ConvertError

# Reads what transformers reads of it, and leaves out the rest.
_SAVE_AGAIN = (
    'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "M.from_pretrained('{model}', dtype='auto').save_pretrained('copy'); "
    "T.from_pretrained('{model}').save_pretrained('copy')\""
)
# From bytes: a file that is mapped must not be written.
_RENAME = (
    'take it off: python -c "import pathlib as p, safetensors.torch as s; '
    "[s.save_file({{k.replace('{prefix}', ''): v for k, v in s.load(f.read_bytes()).items()}}, f, {{'format': 'pt'}})"
    " for f in p.Path('{model}').glob('*.safetensors')]; "
    "[f.write_text(f.read_text().replace('{prefix}', '')) for f in p.Path('{model}').glob('*.index.json')]\""
)


# Of the beginnings of names only.
_REPLACE = (
    'rename them: python -c "import pathlib as p, safetensors.torch as s; '
    "[s.save_file({{'{to}' + k.removeprefix('{prefix}') if k.startswith('{prefix}') else k: v"
    " for k, v in s.load(f.read_bytes()).items()}}, f, {{'format': 'pt'}})"
    " for f in p.Path('{model}').glob('*.safetensors')]; "
    "[f.write_text(f.read_text().replace(chr(34) + '{prefix}', chr(34) + '{to}'))"
    " for f in p.Path('{model}').glob('*.index.json')]\""
)


@dataclass(frozen=True)
class FileCase:
    """file: a pattern of names of files. what, remedy: of the error; {model} is what the user calls it."""

    file: str
    what: str
    remedy: str


_MAKERS_OWN = FileCase(
    "consolidated*",
    "these are the weights in their maker's own format (params.json, consolidated.*), and not in transformers'",
    "take a repository of the model with config.json and model*.safetensors; transformers' sources have"
    " convert_mistral_weights_to_hf.py and convert_llama_weights_to_hf.py, which make one",
)
_WITHOUT_CONFIG = (
    FileCase("params.json", _MAKERS_OWN.what, _MAKERS_OWN.remedy),
    FileCase("*.gguf", "the directory has no config.json, and holds GGUF files", "name one of its files: {first}"),
)
_ADAPTER = FileCase(
    "adapter_config.json",
    "an adapter lies beside the model, and transformers loads both where peft is installed",
    "to convert the model alone, take adapter_config.json out of its directory; for both, move it and"
    " adapter_model.safetensors to a directory of their own, then: bitwright ADAPTER --base {model}",
)


@dataclass(frozen=True)
class NameCase:
    """Tensors that do not match the configuration.

    unknown: a regular expression that one of those fits which are stored and belong to no place. missing: one that all
    of those fit which are not stored. Empty: whatever there is. {layers} in them is one for the numbers of the
    configuration's layers, {stored_layers} and {stored_experts} for those of the stored ones.
    complete: a case only where nothing is missing.
    what, remedy: of the error; besides {model} they may name {name}, the tensor it was found by, {prefix}, what of its
    name the expression's group has found, and {n_layers}.
    """

    what: str
    remedy: str
    unknown: str = ""
    missing: str = ""
    complete: bool = False


_NAMES = (
    NameCase("the names begin with {prefix}, as torch.compile makes them: {name!r}", _RENAME, r"(_orig_mod\.)"),
    NameCase("the names begin with {prefix}, as torch's DistributedDataParallel makes them", _RENAME, r"^(module\.)"),
    NameCase(
        "an adapter is part of the weights, and not merged into them: {name!r}",
        "save it again where it was trained, merged: model.merge_and_unload().save_pretrained('merged')",
        r"^base_model\.model\.|\.lora_[A-Za-z_]+\b|\.base_layer\.|\.modules_to_save\.",
    ),
    NameCase(
        "the weights are quantized already: {name!r} belongs to rounded ones, and rounding them again would add their"
        " errors up",
        "convert the original checkpoint instead",
        r"\.(weight_scale|weight_scale_inv|weight_scale_2|weight_global_scale|weight_zero_point|weight_packed|weight_shape"
        r"|input_scale|input_global_scale|qweight|qzeros|scales|g_idx|absmax|quant_map|SCB)\b",
    ),
    NameCase(
        "this classifies texts and generates none: it has a head for classes ({name!r})",
        "convert the causal language model that it was made from",
        r"^(score|classifier)\.",
    ),
    NameCase(
        "a head for values (of reinforcement learning) is part of the weights: {name!r}",
        "leave it out as transformers does, in a copy: " + _SAVE_AGAIN,
        r"^(v_head|value_head)\.",
    ),
    NameCase(
        "config.json has {n_layers} layers, and more are stored ({name!r}); transformers leaves them out",
        "leave them out, too, in a copy: " + _SAVE_AGAIN + "; or correct num_hidden_layers in config.json",
        r"^model\.layers\.(?!{layers}\.)\d+\.",
    ),
    NameCase(
        "config.json has fewer experts (num_experts, num_local_experts, n_routed_experts) than are stored: {name!r}",
        "take config.json of the same model",
        r"\.experts\.\d+\.",
        complete=True,
    ),
    NameCase(
        "config.json says that there are no biases, and {name!r} is stored, which transformers leaves out",
        'if the model was trained with it, say so in config.json ("attention_bias": true, "mlp_bias": true)',
        r"\.bias$",
        complete=True,
    ),
    NameCase(
        "config.json has num_hidden_layers = {n_layers}, and not all are stored: {name!r} is missing",
        "fetch the weights again; or take config.json of the same model",
        missing=r"^model\.layers\.(?!{stored_layers}\.)\d+\.",
    ),
    NameCase(
        "config.json has more experts (num_experts, num_local_experts, n_routed_experts) than are stored: {name!r} is"
        " missing",
        "fetch the weights again; or take config.json of the same model",
        missing=r"\.experts\.(?!{stored_experts}\.)\d+\.",
    ),
    NameCase(
        "layers lack keys and values ({name!r} is missing), as transformers 5 writes those that share the ones of"
        " another: llama.cpp loads no model of this architecture without them",
        "copy these tensors from the checkpoint that it was trained from: nothing computes with them",
        missing=r"\.self_attn\.[kv]_(proj|norm)\.weight$",
    ),
    NameCase(
        "the model has no head, and its head is not tied to the embedding: transformers would make up a random one",
        "save it again where it was trained, from AutoModelForCausalLM; or, if its head was tied, say so in config.json"
        ' ("tie_word_embeddings": true)',
        missing=r"^lm_head\.weight$",
    ),
)


def refuse_without_config(directory: Path, model: str) -> ConvertError:
    """What a directory without config.json is."""
    for case in _WITHOUT_CONFIG:
        if found := sorted(directory.glob(case.file)):
            return ConvertError(case.what, model, case.remedy.format(model=model, first=found[0]))
    return ConvertError("the directory has no config.json", model, "point to a Hugging Face checkpoint")


def refuse_makers_own(directory: Path) -> None:
    """Raises ConvertError for weights in their maker's own format, in a directory without any in transformers'."""
    if any(directory.glob(_MAKERS_OWN.file)):
        raise ConvertError(_MAKERS_OWN.what, str(directory), _MAKERS_OWN.remedy)


def refuse_adapter(directory: Path, model: str) -> None:
    """Raises ConvertError for an adapter beside the model."""
    if (directory / _ADAPTER.file).is_file():
        raise ConvertError(_ADAPTER.what, str(directory / _ADAPTER.file), _ADAPTER.remedy.format(model=model))


def explain_names(
    missing: Collection[str],
    unknown: Collection[str],
    stored: Collection[str],
    n_layers: int,
    architecture: str,
    model: str,
) -> ConvertError:
    """Why the stored tensors are not those that the configuration asks for: known cases first.

    missing: what is not stored, unknown: what belongs to no place; one of them is not empty. stored: all names.
    """

    def found_in(part: str) -> str:
        return "|".join({match[1] for name in stored if (match := re.search(rf"\.{part}\.(\d+)\.", name))})

    numbers = {"{layers}": "|".join(map(str, range(n_layers)))}
    numbers |= {"{stored_layers}": found_in("layers"), "{stored_experts}": found_in("experts")}
    for case in _NAMES:
        if case.complete and missing:
            continue
        expression = case.missing or case.unknown
        for key, found in numbers.items():
            expression = expression.replace(key, f"(?:{found})")
        names = sorted(missing if case.missing else unknown)
        matches = [match for name in names if (match := re.search(expression, name))]
        if matches and (case.unknown or len(matches) == len(names)):
            match = matches[0]
            said = {"model": model, "name": match.string, "n_layers": n_layers}
            said["prefix"] = match[1] if match.re.groups else ""
            return ConvertError(case.what.format(**said), model, case.remedy.format(**said))
    if (beginnings := _beginnings(missing, unknown)) is not None:
        to, prefix = beginnings
        theirs = f"begin with {to}" if to else "do not"
        return ConvertError(
            f"the names begin with {prefix}, and transformers' {theirs}: {min(unknown)!r}",
            model,
            _REPLACE.format(model=model, to=to, prefix=prefix),
        )
    if not missing:
        return ConvertError(
            f"{len(unknown)} tensors are unknown to the architecture {architecture}, the first is {min(unknown)!r}",
            model,
            "converting without them would change the model; docs/add-an-architecture.md tells how to add them",
        )
    others = f", and has {min(unknown)!r}, which belongs to no place" if unknown else ""
    return ConvertError(f"the checkpoint lacks the tensor {min(missing)!r}{others}", model, "fetch it again")


def _beginnings(missing: Collection[str], unknown: Collection[str]) -> tuple[str, str] | None:
    """The beginning that all missing names have, and the one that all unknown ones have in its place; None where they
    differ in more, or within the layers."""
    if not missing or not unknown:
        return None
    expected, found = _beginning(missing), _beginning(unknown)
    same = {expected + name.removeprefix(found) for name in unknown} == set(missing)
    return (expected, found) if same and found and "layers." not in expected else None


def _beginning(names: Collection[str]) -> str:
    """The parts, each with its dot, that all of the names begin with."""
    first, last = min(names).split("."), max(names).split(".")
    n_parts = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first) - 1)
    return "".join(f"{part}." for part in first[:n_parts])
