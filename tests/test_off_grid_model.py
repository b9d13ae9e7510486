"""The model of the demo is the real one, with weights that no format has on its grid."""

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitwright.formats.registry import get_format
from scripts.smollm2 import build


def test_it_computes_the_same_and_lies_on_no_grid(smollm2, tmp_path):
    turned = build(tmp_path / "turned", off_grid=True)
    tokens = torch.arange(100, 132)[None]
    with torch.no_grad():
        own, moved = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits.log_softmax(-1)
            for path in (smollm2, turned)
        )
    assert float((own.exp() * (own - moved)).sum(-1).mean()) < 1e-3  # both are rounded to bfloat16
    q4_1 = get_format("Q4_1")
    for path, on_grid in ((smollm2, True), (turned, False)):
        weights = load_file(path / "model.safetensors")
        for kind in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            rows = weights[f"model.layers.3.{kind}.weight"].float().numpy()[:32]
            error = np.square(q4_1.decode(q4_1.encode(rows)) - rows).sum() / np.square(rows).sum()
            assert (error < 1e-4) == on_grid, kind
