"""Run llama.cpp's own converter over many checkpoints in one process; a program for its own environment.

    python llama_cpp_converter.py PRE_TOKENIZER CHECKPOINT OUTPUT [CHECKPOINT OUTPUT ...]

Each CHECKPOINT directory becomes the F32 GGUF file OUTPUT. The converter knows pre-tokenizers by a hash over the ids of
a fixed text, which no tiny vocabulary can match: PRE_TOKENIZER, of which the tiny ones are made, is what it is told.
"""

import sys
from pathlib import Path

import gguf
import torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
from conversion.base import TextModel


def main() -> None:
    pre_tokenizer, *paths = sys.argv[1:]
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    with torch.inference_mode():
        for checkpoint, output in zip(paths[::2], paths[1::2], strict=True):
            architecture = get_model_architecture(ModelBase.load_hparams(Path(checkpoint), False), ModelType.TEXT)
            model_class = get_model_class(architecture)
            model_class(Path(checkpoint), gguf.LlamaFileType.ALL_F32, Path(output)).write()


if __name__ == "__main__":
    main()
