"""Factors folded between the tensors of every architecture whose data file says what feeds what."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from bitwright.converter.model.model_map import describe
from bitwright.converter.smoothing.folder import Folder
from bitwright.converter.smoothing.groups import smoothing_groups
from bitwright.converter.source.open import open_checkpoint
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 24)))


def logits(directory) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(TOKENS).logits


@pytest.mark.parametrize("name", TINY_MODELS)
def test_transformers_computes_the_same(name, tiny, tmp_path):
    source = tiny(name)
    checkpoint = open_checkpoint(str(source))
    folder, rng = Folder(checkpoint, norms="F32"), np.random.default_rng(5)
    for group in smoothing_groups(checkpoint, describe(checkpoint)):
        for link in group.links:
            folder.fold(link, np.exp2(rng.uniform(-2, 2, link.rows[1] - link.rows[0])).astype(np.float32))
    view = folder.view()
    shutil.copytree(source, tmp_path / "folded", ignore=shutil.ignore_patterns("*.safetensors*"))
    folded = {name: view.read(name).reshape(tensor.shape) for name, tensor in view.tensors.items()}
    save_file(folded, tmp_path / "folded" / "model.safetensors", {"format": "pt"})
    wanted, found = logits(source), logits(tmp_path / "folded")
    assert folder.foldings
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
