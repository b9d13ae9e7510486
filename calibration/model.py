"""transformers' model of a configuration, built without weights."""

from pathlib import Path

import torch
from torch import nn

from calibration.choices import Dtype
from formats.errors import ConvertError


def choose_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """What the model computes in; "auto" is bfloat16 on cuda and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" takes a GPU where torch finds one."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available.get(name, False):
        usable = [kind for kind in ("auto", *available) if kind == "auto" or available[kind]]
        raise ConvertError(f"torch finds no device {name!r} here", "--device", f"choose among: {', '.join(usable)}")
    return torch.device(name)


def load_config(directory: Path):
    """The configuration of the text model, from a directory with config.json; code beside it is never run."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers lets through whatever a damaged file leads to
        raise ConvertError(
            f"transformers cannot read the model's configuration ({error})",
            str(directory),
            "check config.json; without calibration, give an importance matrix with --imatrix",
        ) from error
    return config.get_text_config()


def build_without_weights(config, dtype: torch.dtype, device: torch.device):
    """The causal language model with parameters on the meta device and buffers (rotary frequencies) on `device`.

    The model fills its buffers itself, by the same method with which from_pretrained does. Experts run one by one,
    which shows each expert's own inputs.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager"
        )
    model.eval().requires_grad_(False)
    for module in model.modules():
        _fill_buffers(model, module, device)
    return model


def _fill_buffers(model, module: nn.Module, device: torch.device) -> None:
    buffers = dict(module.named_buffers(recurse=False))
    if not buffers:
        return
    for name, buffer in buffers.items():
        setattr(module, name, torch.empty_like(buffer, device=device))
    model._init_weights(module)
