"""Tiny random checkpoints of every architecture, written by transformers itself, with the logits it computes."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

N_TOKENS = 200
VOCAB_SIZE = 400
# llama.cpp's name of the pre-tokenizer that the "bpe" tokenizers have.
PRE_TOKENIZER = "qwen2"
# Long enough that neither trainer runs out of pairs, with every ASCII letter in it.
_TEXT = [
    "The quick brown fox jumps over the lazy dog; the five boxing wizards jump quickly.",
    "Pack my box with five dozen liquor jugs! How vexingly quick daft zebras jump?",
    "def encode(rows): return [row * 2 for row in rows if row % 3 == 1]",
    "Ein Zwölftel des Jahres vergeht, während Öl und Äpfel übrig bleiben: 1234567890.",
    "Sphinx of black quartz, judge my vow, and tell whether 31415926 is larger than 27182818.",
]
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@dataclass(frozen=True)
class TinyModel:
    """architecture: the part of the transformers class names before "Config" and "ForCausalLM".
    options: of the configuration, beside the sizes.
    tokenizer: "sentencepiece" (tokenizer.model), "sentencepiece-bare" (without a space in front of the text), or "bpe"
        (tokenizer.json).
    n_tokens: length of the sequence that the logits are computed for."""

    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "sentencepiece"
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"
    n_tokens: int = N_TOKENS


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": rope_type, **parameters}}


_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = _rope(
    "longrope", short_factor=[1.0 + 0.05 * i for i in range(8)], long_factor=[1.0 + 0.7 * i for i in range(8)]
) | {"original_max_position_embeddings": 512}

TINY_MODELS: dict[str, TinyModel] = {
    "llama": TinyModel("Llama", tokenizer="bpe", dtype=torch.bfloat16, max_shard_size="100KB"),
    "llama-tied": TinyModel("Llama", {"tie_word_embeddings": True}, dtype=torch.float16),
    "llama-biases": TinyModel("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": TinyModel("Llama", _rope("linear", factor=4.0)),
    "llama-yarn": TinyModel("Llama", _rope("yarn", **_YARN)),
    "llama-yarn-attention-factor": TinyModel("Llama", _rope("yarn", attention_factor=1.4, beta_fast=16.0, **_YARN)),
    "llama-llama3": TinyModel(
        "Llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128),
    ),
    # Rows of 256 and 512, which every K format fits.
    "llama-256": TinyModel(
        "Llama", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}, "bpe", torch.bfloat16
    ),
    "mistral": TinyModel("Mistral", {"head_dim": 32, "sliding_window": None}),
    "mixtral": TinyModel("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": TinyModel("Qwen2", {"tie_word_embeddings": True}, tokenizer="bpe"),
    "qwen2-yarn": TinyModel("Qwen2", _rope("yarn", **_YARN), tokenizer="bpe"),
    "qwen3": TinyModel("Qwen3", {"head_dim": 32}, tokenizer="bpe"),
    "qwen3_moe": TinyModel(
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
        tokenizer="bpe",
    ),
    # Six layers, so that the last has full attention; a window shorter than the sequence.
    "gemma3": TinyModel(
        "Gemma3",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "num_hidden_layers": 6},
        tokenizer="sentencepiece-bare",
    ),
    "gemma3-linear": TinyModel(
        "Gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
        tokenizer="sentencepiece-bare",
    ),
    "phi3": TinyModel("Phi3", {"sliding_window": None}),
    # llama.cpp and transformers take the short factors up to the original length, and the long ones beyond it.
    "phi3-longrope": TinyModel("Phi3", {"sliding_window": None, **_LONGROPE}),
    "phi3-longrope-long": TinyModel("Phi3", {"sliding_window": None, **_LONGROPE}, n_tokens=560),
}


def build(name: str, directory: Path) -> None:
    """Write the tiny model of this name as a Hugging Face checkpoint into the directory."""
    build_model(TINY_MODELS[name], name, directory)


def build_model(tiny: TinyModel, name: str, directory: Path) -> None:
    """The same with any tiny model; the name decides the random weights."""
    model = _model(tiny, name)
    model.to(tiny.dtype).save_pretrained(directory, max_shard_size=tiny.max_shard_size)
    _TOKENIZERS[tiny.tokenizer](directory)


def tokens(name: str) -> list[int]:
    """The sequence that `reference_logits` are computed for."""
    return np.random.default_rng(7).integers(3, VOCAB_SIZE, TINY_MODELS[name].n_tokens).tolist()


def reference_logits(name: str) -> np.ndarray:
    """float32 [n_tokens, VOCAB_SIZE]: transformers' logits with the weights as they are stored."""
    model = _model(TINY_MODELS[name], name)
    with torch.inference_mode():
        for parameter in model.parameters():  # only these: rounded rope frequencies would be another model's
            parameter.copy_(parameter.to(TINY_MODELS[name].dtype))
        return model(torch.tensor([tokens(name)])).logits[0].numpy()


def _model(tiny: TinyModel, name: str) -> transformers.PreTrainedModel:
    config_class = f"{tiny.architecture}{'Text' if tiny.architecture == 'Gemma3' else ''}Config"
    config = getattr(transformers, config_class)(**_SIZES | tiny.options)
    config.architectures = [f"{tiny.architecture}ForCausalLM"]
    model = getattr(transformers, f"{tiny.architecture}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms around their neutral value, biases around zero
                parameter.add_(0.2 * noise)
            else:
                scale = 1.0 if "embed" in parameter_name else 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(scale * noise)
    return model


@cache
def _bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # Qwen2's own definition, which llama.cpp knows.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(pattern=Regex(pattern), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def _save_bpe(directory: Path) -> None:
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_bpe(), bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(directory)


@cache
def _sentencepiece(add_dummy_prefix: bool) -> bytes:
    trained: list[bytes] = []

    class Writer:
        def write(self, data: bytes) -> None:
            trained.append(data)

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT * 20),
        model_writer=Writer(),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=add_dummy_prefix,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        # llama.cpp looks for it in every model whose name has "phi3" in it.
        control_symbols=["<|endoftext|>"],
        minloglevel=2,
    )
    return b"".join(trained)


def _save_sentencepiece(directory: Path, add_dummy_prefix: bool = True) -> None:
    (directory / "tokenizer.model").write_bytes(_sentencepiece(add_dummy_prefix))
    settings: dict[str, Any] = {"add_bos_token": True, "add_eos_token": False}
    if add_dummy_prefix:
        settings |= {"tokenizer_class": "LlamaTokenizer"}
    else:
        settings |= {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "mask_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


_TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "bpe": _save_bpe,
    "sentencepiece": _save_sentencepiece,
    "sentencepiece-bare": partial(_save_sentencepiece, add_dummy_prefix=False),
}
