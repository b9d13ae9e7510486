"""Tiny random checkpoints of every architecture, written by transformers itself, with the logits it computes."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.shared_files import shared

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
class Hub:
    """What the files on the Hub have otherwise than transformers writes them.

    config: keys of config.json, "text_config.key" in a section of it.
    without: keys of config.json that are not there.
    names: tensors' names, as patterns and what takes their place.
    transposed: pattern of the tensors whose last two dimensions change places.
    own_names: transformers' own names and fused experts, which some are stored in.
    extra: tensors that transformers does not load: name -> shape.
    files: further JSON files: path -> content."""

    config: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    transposed: str = ""
    own_names: bool = False
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class TinyModel:
    """architecture: the part of the transformers class names before "Config" and "ForCausalLM".
    options: of the configuration, beside the sizes; None takes a size away.
    tokenizer: "sentencepiece" (tokenizer.model), "sentencepiece-bare" (without a space in front of the text),
        "gemma-json" (that one as tokenizer.json), "bpe" (tokenizer.json), "bpe-glm" (with more special tokens),
        "wordpiece", "unigram-t5" or "unigram-roberta".
    n_tokens: length of the sequence that the logits are computed for.
    config_class, model_class: where the names of the classes do not follow from the architecture.
    wrapper: of a model with encoders of images or sound, its other options; sizes and options are its text_config's.
    hub: what the Hub's files have otherwise than transformers writes it."""

    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "sentencepiece"
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"
    n_tokens: int = N_TOKENS
    config_class: str = ""
    model_class: str = ""
    wrapper: dict[str, Any] | None = None
    hub: Hub = Hub()


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": rope_type, **parameters}}


_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = rope(
    "longrope", short_factor=[1.0 + 0.05 * i for i in range(8)], long_factor=[1.0 + 0.7 * i for i in range(8)]
) | {"original_max_position_embeddings": 512}

TINY_MODELS: dict[str, TinyModel] = {
    "llama": TinyModel("Llama", tokenizer="bpe", dtype=torch.bfloat16, max_shard_size="100KB"),
    "llama-tied": TinyModel("Llama", {"tie_word_embeddings": True}, dtype=torch.float16),
    "llama-biases": TinyModel("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": TinyModel("Llama", rope("linear", factor=4.0)),
    "llama-yarn": TinyModel("Llama", rope("yarn", **_YARN)),
    "llama-yarn-attention-factor": TinyModel("Llama", rope("yarn", attention_factor=1.4, beta_fast=16.0, **_YARN)),
    "llama-llama3": TinyModel(
        "Llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128),
    ),
    # Rows of 256 and 512, which every K format fits.
    "llama-256": TinyModel(
        "Llama", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}, "bpe", torch.bfloat16
    ),
    "mistral": TinyModel("Mistral", {"head_dim": 32, "sliding_window": None}),
    "mixtral": TinyModel("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": TinyModel("Qwen2", {"tie_word_embeddings": True}, tokenizer="bpe"),
    "qwen2-yarn": TinyModel("Qwen2", rope("yarn", **_YARN), tokenizer="bpe"),
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


def checkpoint(name: str, tiny: TinyModel | None = None) -> Path:
    """The tiny model of this name as a Hugging Face checkpoint, built once for all tests; not to be written to.

    tiny: another than that of TINY_MODELS.
    """
    tiny = tiny or TINY_MODELS[name]
    return shared(name, repr(tiny), partial(build_model, tiny, name))


def build(name: str, directory: Path) -> None:
    """Write the tiny model of this name into the directory, for tests that change it."""
    shutil.copytree(checkpoint(name), directory, dirs_exist_ok=True)


def build_model(tiny: TinyModel, name: str, directory: Path) -> None:
    """Write any tiny model into the directory; the name decides the random weights."""
    model = _model(tiny, name)
    model.to(tiny.dtype).save_pretrained(
        directory, max_shard_size=tiny.max_shard_size, save_original_format=not tiny.hub.own_names
    )
    _TOKENIZERS[tiny.tokenizer](directory)
    _write_hub_files(directory, tiny.hub)


def tokens(name: str, tiny: TinyModel | None = None) -> list[int]:
    """The sequence that `reference_logits` are computed for."""
    return np.random.default_rng(7).integers(3, VOCAB_SIZE, (tiny or TINY_MODELS[name]).n_tokens).tolist()


def reference_logits(name: str, tiny: TinyModel | None = None) -> np.ndarray:
    """float32 [n_tokens, VOCAB_SIZE]: what transformers computes in float32 of the checkpoint it loads; of a model
    without a head [n_tokens, hidden], the last layer's output."""
    tiny = tiny or TINY_MODELS[name]
    model_class = getattr(transformers, configuration(tiny).architectures[0])
    model = model_class.from_pretrained(checkpoint(name, tiny), dtype=torch.float32).eval()
    with torch.inference_mode():
        output = model(torch.tensor([tokens(name, tiny)]))
    return (output.logits if "logits" in output else output.last_hidden_state)[0].numpy()


def _write_hub_files(directory: Path, hub: Hub) -> None:
    config = json.loads((directory / "config.json").read_text())
    for name, value in hub.config.items():
        section, key = _section(config, name)
        section[key] = value
    for name in hub.without:
        section, key = _section(config, name)
        del section[key]
    for path, content in {"config.json": config, **hub.files}.items():
        (directory / path).parent.mkdir(exist_ok=True)
        (directory / path).write_text(json.dumps(content, indent=2))
    if hub.names or hub.transposed or hub.extra:
        path = directory / "model.safetensors"
        tensors = {_renamed(name, hub.names): tensor for name, tensor in load_file(path).items()}
        for name, tensor in tensors.items():
            if hub.transposed and re.search(hub.transposed, name):
                tensors[name] = tensor.transpose(-1, -2).contiguous()
        generator = torch.Generator().manual_seed(1)
        for name, shape in hub.extra.items():
            noise = torch.randn(shape, generator=generator)
            tensors[name] = 1.0 + 0.2 * noise if len(shape) == 1 else 1.5 * shape[-1] ** -0.5 * noise
        save_file(tensors, path, {"format": "pt"})


def _section(config: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    *sections, key = name.split(".")
    for part in sections:
        config = config[part]
    return config, key


def _renamed(name: str, patterns: dict[str, str]) -> str:
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name


def configuration(tiny: TinyModel) -> transformers.PreTrainedConfig:
    """The configuration that the model is made of."""
    config_class = tiny.config_class or f"{tiny.architecture}{'Text' if tiny.architecture == 'Gemma3' else ''}Config"
    without = {key for key, value in tiny.options.items() if value is None and key in _SIZES}
    options = {key: value for key, value in (_SIZES | tiny.options).items() if key not in without}
    if tiny.wrapper is not None:
        ids = {key: options[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in options}
        options = {"text_config": options} | ids | tiny.wrapper
    config = getattr(transformers, config_class)(**options)
    config.architectures = [tiny.model_class or f"{tiny.architecture}ForCausalLM"]
    return config


def _model(tiny: TinyModel, name: str) -> transformers.PreTrainedModel:
    config = configuration(tiny)
    torch.manual_seed(0)  # what is left of transformers' own initial values is random too
    model = getattr(transformers, config.architectures[0])(config).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    stored = model.state_dict()
    buffers = [(key, buffer) for key, buffer in model.named_buffers() if key in stored and buffer.is_floating_point()]
    with torch.no_grad():
        for parameter_name, parameter in [*model.named_parameters(), *buffers]:
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim <= 1:  # norms around their neutral value, biases around zero
                parameter.add_(0.2 * noise)
            else:
                scale = 1.0 if "embed" in parameter_name else 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(scale * noise)
    return model


@cache
def _bpe(special_tokens: tuple[str, ...] = ()) -> Tokenizer:
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
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def _save_bpe(directory: Path, special_tokens: tuple[str, ...] = ()) -> None:
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_bpe(special_tokens),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    fast.save_pretrained(directory)


@cache
def _unigram() -> bytes:
    # The model type's own tokens come on top of these.
    return _train_sentencepiece(
        model_type="unigram", vocab_size=300, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
    )


@cache
def _sentencepiece(add_dummy_prefix: bool) -> bytes:
    return _train_sentencepiece(
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=add_dummy_prefix,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        # llama.cpp looks for it in every model whose name has "phi3" in it.
        control_symbols=["<|endoftext|>"],
    )


def _train_sentencepiece(**settings: Any) -> bytes:
    trained: list[bytes] = []

    class Writer:
        def write(self, data: bytes) -> None:
            trained.append(data)

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT * 20), model_writer=Writer(), minloglevel=2, **settings
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


def _save_gemma(directory: Path) -> None:
    _save_sentencepiece(directory, add_dummy_prefix=False)
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    (directory / "tokenizer.model").unlink()


def _save_wordpiece(directory: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        _TEXT, trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    )
    while tokenizer.get_vocab_size() < VOCAB_SIZE:
        tokenizer.add_tokens([f"[unused{tokenizer.get_vocab_size()}]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    fast.save_pretrained(directory)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocabulary))


def _save_unigram(directory: Path, file_name: str, tokenizer_class: str) -> None:
    (directory / file_name).write_bytes(_unigram())
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class, "extra_ids": 0}))
    getattr(transformers, tokenizer_class).from_pretrained(directory).save_pretrained(directory)


_TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "bpe": _save_bpe,
    "bpe-glm": partial(_save_bpe, special_tokens=("[gMASK]", "<sop>", "<|user|>", "<|observation|>")),
    "sentencepiece": _save_sentencepiece,
    "sentencepiece-bare": partial(_save_sentencepiece, add_dummy_prefix=False),
    "gemma-json": _save_gemma,
    "wordpiece": _save_wordpiece,
    "unigram-t5": partial(_save_unigram, file_name="spiece.model", tokenizer_class="T5Tokenizer"),
    "unigram-roberta": partial(
        _save_unigram, file_name="sentencepiece.bpe.model", tokenizer_class="XLMRobertaTokenizer"
    ),
}
