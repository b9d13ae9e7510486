"""transformers' model of a configuration, built without weights."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.calibration.choices import Dtype
from bitwright.formats.errors import ConvertError


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


def others_alike(device: torch.device) -> list[torch.device]:
    """The other GPUs that torch sees, of the kind of this one: they compute the same, to the last bit. Of CUDA alone,
    and where that has only this one, none."""
    if device.type != "cuda":
        return []
    own = torch.cuda.current_device()
    kind, numbers = torch.cuda.get_device_name(own), range(torch.cuda.device_count())
    return [torch.device("cuda", i) for i in numbers if i != own and torch.cuda.get_device_name(i) == kind]


def compute_exactly(device: torch.device, dtype: torch.dtype) -> None:
    """Where float32 is asked for: unless told, CUDA convolutions round inputs to TF32, with 10 bits of mantissa."""
    if device.type == "cuda" and dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def load_config(directory: Path) -> Any:
    """transformers' configuration of the whole model, from a directory with config.json; code beside it is never run.
    That of the text model in it is its get_text_config()."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers lets through whatever a damaged file leads to
        raise ConvertError(
            f"transformers cannot read the model's configuration ({error})",
            str(directory),
            "check config.json; without calibration, give an importance matrix with --imatrix",
        ) from error


def build_without_weights(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' language model of a whole model's configuration, with parameters on the meta device and buffers
    (rotary frequencies) on this one. An encoder has no output head.

    The model fills its buffers itself, by the same method with which from_pretrained does. Experts run one by one,
    which shows each expert's own inputs. Attention is torch's, and the model's own where it takes no other.
    Raises ConvertError for a model of which transformers has no decoder or encoder of text.
    """
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise _not_run(config, "it is an encoder with a decoder")
    build = _builder(config, text)
    try:
        model = build(text, dtype, "sdpa")
    except ValueError:  # what transformers raises for an attention that the model does not have
        model = build(text, dtype, "eager")
    model.eval().requires_grad_(False)
    _fill_buffers(model, model, device)
    return model


def _builder(config: Any, text: Any) -> Callable[[Any, torch.dtype, str], Any]:
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    def from_config(auto: Any, options: dict[str, Any], text: Any, dtype: torch.dtype, attention: str) -> Any:
        with torch.device("meta"):
            return auto.from_config(
                text, dtype=dtype, attn_implementation=attention, experts_implementation="eager", **options
            )

    if is_encoder(config):
        model: Any = MODEL_MAPPING[type(text)]
        without = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model).parameters else {}
        return partial(from_config, AutoModel, without)
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return partial(from_config, AutoModelForCausalLM, {})
    if text is not config and type(text) in MODEL_MAPPING:
        from bitwright.calibration.stream.anatomy.with_head import with_head

        return lambda text, dtype, attention: with_head(partial(from_config, AutoModel, {}), text, dtype, attention)
    raise _not_run(config, "transformers has no language model of it")


def is_encoder(config: Any) -> bool:
    """Whether the model makes embeddings of texts and predicts no tokens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    text, classes = config.get_text_config(), config.architectures or []
    headless = [name.endswith("Model") and not name.endswith("HeadModel") for name in classes]
    masked = text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(text, "is_decoder", False)
    return masked or any(headless) or getattr(text, "use_bidirectional_attention", None) is True


def _not_run(config: Any, why: str) -> ConvertError:
    return ConvertError(
        f"calibration does not run {config.model_type!r}: {why}",
        "config.json",
        "give an importance matrix with --imatrix FILE and --judge off, or convert to 8 bits and more",
    )


def _fill_buffers(model: Any, module: nn.Module, device: torch.device) -> None:
    """Of the module and all in it; model: the innermost of transformers' models that it is part of, which knows how.
    What it does not fill is not a number, and shows."""
    from transformers import PreTrainedModel

    model = module if isinstance(module, PreTrainedModel) else model
    for child in module.children():
        _fill_buffers(model, child, device)
    buffers = dict(module.named_buffers(recurse=False))
    for name, buffer in buffers.items():
        filled = torch.empty_like(buffer, device=device)
        setattr(module, name, filled.fill_(torch.nan) if filled.is_floating_point() else filled)
    if buffers or module is model:  # a model may fill what modules inside of it have
        model._init_weights(module)
