"""Tiny tokenizers of every kind, trained in a fraction of a second on a few lines in many scripts.

    byte_level(directory, pre_tokenizer)     tokenizer.json: BPE over bytes, any pre-tokenizer
    byte_fallback(directory, steps...)       tokenizer.json: BPE over characters with byte tokens
    sentencepiece(directory, **options)      tokenizer.model: SentencePiece, BPE unless told otherwise
    word_pieces(directory, **settings)       vocab.txt: WordPiece, as BERT has it
    unigram(directory, tokenizer_class)      SentencePiece's Unigram under the name of the class's family
    write_vocabulary(path, metadata)         a GGUF file that has a vocabulary only

Each builder also writes the config files that a checkpoint has, and returns the library's own tokenizer.
"""

import json
import random
from pathlib import Path
from typing import Any

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bitwright.formats.files.gguf import lay_out

# Text that is nothing special to any definition.
PLAIN_TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 1 dog, 22 cats, 333 birds; they'll see 4444 or 1234567890!",
    "I'M SURE YOU'RE RIGHT, we'Ve been told he'D go. 'tis  double  spaced,   and    more     so.",
    "def encode(rows: list[int], n=10):\n    if not rows:\n\t\treturn b''\n\n\n    return rows[0] ** 2  # ok\n",
    '{"name": "x_y", "value": 3.14e-10, "path": "C:\\\\tmp\\\\a.txt", "url": "https://example.org/?q=1&r=2#top"}',
    "Здравствуй, мир! Где находится библиотека? Привет ещё раз. Η γλώσσα και το αλφάβητο.",
    "Où est passée l'élève d'à côté ? Größe, Straße, naïve façade, señor, ångström, Łódź, İstanbul.",
    "日本語のテキストを書きます。漢字とカタカナ。中文文本处理，很好！한국어 텍스트입니다.",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם, מה שלומך?",
    "🚀 rockets 🦙🦙 llamas ✅ (done) ©®™ €100 £5 → ← ∑∫ ½ ² x²+y²",
    "line\r\nline\r\n\r\n   indented\n \n  \n\t\tend   ",
    " ",
    "\n\n\n",
    "",
)
# Text that shows where llama.cpp's engine for regular expressions is not the library's.
HARD_TEXTS = (
    "नमस्ते दुनिया, यह हिन्दी में लिखा गया है। १२३४५ ไทยภาษาที่สวยงาม ๑๒๓",
    "e\u0301te\u0301 نَصٌّ عَرَبِيٌّ 👩\u200d👩\u200d👧\ufe0f CamelCaseHTTPServer camelCase ПриветМИР ΑβΓδ ǅ ʰʰ",
    "full\u3000width\u3000１２３４５ \u00a0no\u00a0break\u2003em\u200bzero",
)
SPECIAL_TEXT = "<|begin|>system<|end|>\n text<|end|><|begin|>"

_LETTERS = [
    *"abcXYZéßñЖжΩαאبदิไ漢かカ한'’sStTmMrRlLdD0123456789٣१²½Ⅷ.,!?;:()[]{}<>/\\|_-+=*&^%$#@~`\" \t\n\r",
    *("\u00a0", "\u3000", "\u200d", "\ufe0f", "\u0301", "😀", "ǅ", "ʰ", "ー", "。", "１", "  ", "'s", "\r\n", "12345"),
]


def random_texts(n: int) -> list[str]:
    """The same n short strings at every call: letters, marks, digits and spaces of many kinds in a row."""
    source = random.Random(0)
    return ["".join(source.choices(_LETTERS, k=source.randint(1, 40))) for _ in range(n)]


def splits(expressions: list[str]) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that splits by one expression after another."""
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(
    directory: Path,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    ignore_merges: bool = False,
    merges_over_bounds: bool = False,
    begin: bool = False,
) -> Tokenizer:
    """merges_over_bounds: learn the merges without the pre-tokenizer, so that tokens show every bound it draws.
    begin: put <|begin|> in front of a text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    blocks = pre_tokenizers.Split(Regex(r"[\s\S]{1,6}"), "isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([blocks, to_letters]) if merges_over_bounds else pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*PLAIN_TEXTS, *HARD_TEXTS, *random_texts(500)], trainer)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_tokens(["[tool▁call]", "[über]"])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", 0)]
        )
    return _save(tokenizer, directory, bos_token="<|begin|>", eos_token="<|end|>")


def byte_fallback(
    directory: Path,
    normalizer: normalizers.Normalizer | None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None,
) -> Tokenizer:
    """The kind that SentencePiece's BPE becomes when it is rewritten as a tokenizer.json."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁*[^▁\n]*|\n+"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator([*PLAIN_TEXTS, *HARD_TEXTS], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in byte_tokens]
    content["normalizer"] = content["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens(["[INST]"])
    return _save(tokenizer, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece(directory: Path, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """options: of SentencePiece's trainer. settings: the content of tokenizer_config.json. Returns the processor."""
    from sentencepiece import SentencePieceTrainer

    directory.mkdir(parents=True, exist_ok=True)
    lines = [line for text in (*PLAIN_TEXTS, *HARD_TEXTS) for line in text.split("\n") if line] * 2
    defaults = {
        "model_type": "bpe",
        "vocab_size": 1000,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "num_threads": 1,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(directory / "tokenizer"), **(defaults | options)
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    return load_sentencepiece(directory)


def word_pieces(directory: Path, lowercase: bool = True, **settings: Any) -> int:
    """A vocab.txt and a tokenizer_config.json with these settings; returns the number of tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*PLAIN_TEXTS, *HARD_TEXTS], trainer)
    texts = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.txt").write_text("".join(f"{text}\n" for text, _ in texts), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings}))
    (directory / "config.json").write_text('{"model_type": "bert"}')
    return len(texts)


def unigram(directory: Path, tokenizer_class: str, **options: Any) -> None:
    """SentencePiece's Unigram and the config files of XLM-R ("XLMRobertaTokenizer") or T5 ("T5Tokenizer"). options: of
    SentencePiece's trainer."""
    of_t5 = tokenizer_class == "T5Tokenizer"
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if of_t5 else {}
    defaults: dict[str, Any] = {
        **{"model_type": "unigram", "vocab_size": 330, "byte_fallback": False, "split_digits": False},
        **{"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        "allow_whitespace_only_pieces": False,
    }
    sentencepiece(directory, {"tokenizer_class": tokenizer_class}, **(defaults | ids | options))
    name = "spiece.model" if of_t5 else "sentencepiece.bpe.model"
    (directory / "tokenizer.model").rename(directory / name)
    (directory / "config.json").write_text(json.dumps({"model_type": "t5" if of_t5 else "xlm-roberta"}))


def load_sentencepiece(directory: Path) -> Any:
    """SentencePiece's own processor of the directory's tokenizer.model."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


def _save(tokenizer: Tokenizer, directory: Path, **special_tokens: str) -> Tokenizer:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special_tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def write_vocabulary(path: Path, metadata: dict[str, GGUFValue]) -> Path:
    """A GGUF file without tensors, which llama.cpp loads with `vocab_only`."""
    architecture = {"general.architecture": GGUFValue("llama", GGUFValueType.STRING)}
    (layout,) = lay_out(path.name, architecture | metadata, [])
    path.write_bytes(layout.header)
    return path
