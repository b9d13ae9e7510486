"""Run llama.cpp's own converter over many checkpoints in one process; a program for its own environment.

    python llama_cpp_converter.py PRE_TOKENIZER CHECKPOINT OUTPUT [CHECKPOINT OUTPUT ...]

Each CHECKPOINT directory becomes the F32 GGUF file OUTPUT; where the converter cannot, OUTPUT is a text file that says
why. Its answers depend on nothing but the checkpoint:

- It knows pre-tokenizers by a hash over the ids of a fixed text, which no tiny vocabulary can match: PRE_TOKENIZER, of
  which the tiny ones are made, is what it is told.
- It is newer than the gguf beside it: what that lacks is a name without a value, so that only what needs it fails; and
  names of the layers that predict several tokens are, in architectures that it lacks them for, those of all others.
- It reads config.json through transformers 5, which renames keys and adds others: the file's own come first.
- It keeps the layers that predict several tokens where some are stored, and does not ask config.json alone.
"""

import enum
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open

_known = enum.EnumType.__getattr__


def _named(cls: enum.EnumType, name: str) -> Any:
    try:
        return _known(cls, name)
    except AttributeError:
        if cls.__module__.startswith("gguf") and name.isupper():
            return f"gguf lacks {name}"
        raise


enum.EnumType.__getattr__ = _named  # before the converter is imported, whose tables name them

from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # noqa: E402
from conversion.base import TextModel  # noqa: E402
from conversion.hunyuan import HunYuanMoEModel  # noqa: E402

_load_hparams = ModelBase.load_hparams


def _own_keys_first(directory: Path, is_mistral_format: bool = False) -> dict[str, Any]:
    stored = json.loads((directory / "config.json").read_text())
    if stored["model_type"] == "nemotron_h":  # transformers' defaults make a model of experts of every one
        return stored
    return _merged(stored, _load_hparams(directory, is_mistral_format))


def _merged(stored: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    merged = loaded | stored
    for key, value in stored.items():
        if isinstance(value, dict) and isinstance(loaded.get(key), dict):
            merged[key] = _merged(value, loaded[key])
    return merged


def main() -> None:
    pre_tokenizer, *paths = sys.argv[1:]
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    HunYuanMoEModel.set_vocab = lambda self: self._set_vocab_gpt2()  # instead of a tiktoken vocabulary
    gguf.GGUFWriter.add_indexer_types = lambda self, types: self.add_array(
        f"{self.arch}.attention.indexer.types", types
    )
    for arch in (gguf.MODEL_ARCH.QWEN3NEXT, gguf.MODEL_ARCH.DEEPSEEK2):
        named = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GLM4_MOE]
        gguf.MODEL_TENSORS[arch] += [tensor for tensor in named if tensor.name.startswith("NEXTN_")]
    ModelBase.load_hparams = staticmethod(_own_keys_first)
    with torch.inference_mode():
        for checkpoint, output in zip(paths[::2], paths[1::2], strict=True):
            try:
                _convert(Path(checkpoint), Path(output))
            except Exception:
                Path(output).write_text(traceback.format_exc())


def _stores_mtp(checkpoint: Path, n_layers: int | None) -> bool:
    names = set().union(*(safe_open(path, "np").keys() for path in checkpoint.glob("*.safetensors")))
    return any(name.startswith("mtp.") or f"layers.{n_layers}." in name for name in names)


def _convert(checkpoint: Path, output: Path) -> None:
    config = ModelBase.load_hparams(checkpoint)
    model_class = get_model_class(get_model_architecture(config, ModelType.TEXT))
    model_class.no_mtp = not _stores_mtp(checkpoint, config.get("text_config", config).get("num_hidden_layers"))
    model_class(checkpoint, gguf.LlamaFileType.ALL_F32, output).write()


if __name__ == "__main__":
    main()
