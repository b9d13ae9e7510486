"""Of a checkpoint that is quantized already the tensors that it stands for, decoded as they are read.

What is stored in codes is found by the names and dtypes of tensors; `quantization_config` says what these cannot, and
the name of the method. What it keeps out of quantization (`ignore`, `modules_to_not_convert`) is stored whole.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from bitwright.converter.source.quantized import kinds
from bitwright.converter.source.quantized.sides import Sides
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.stored_tensor import SourceTensor, StoredTensor
from bitwright.formats.quantized.decoded_tensor import DecodedTensor, Decoder

KEY = "quantization_config"
DECODED_METHODS = (
    *("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt", "modelopt_fp4", "gptq", "gptqmodel"),
    *("awq", "auto-round", "intel/auto-round", "bitnet", "bitsandbytes"),
)
"""What `quant_method` may be."""

_DECODED_FORMATS = (
    *("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense"),
)
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Stored beside quantized modules, for inputs and caches.
_OF_INPUTS = re.compile(
    r"[._](input_scale|input_global_scale|input_zero_point|activation_scale|output_scale|prob_output_scale"
    r"|[qkv]_scale|[kv]_proj\.output_scale|kv_scale|qscale_act)$"
)
_NOT_WEIGHTS_ALONE = re.compile(r"[._](pre_quant_scale|weight_scale_zero|bias_correction|SCB_inputs)$")

Handler = Callable[[Sides, StoredTensor, kinds.Stated], Decoder | None]
_BY_END: tuple[tuple[str, str, Handler], ...] = (
    ("_packed", "", kinds.packed),
    ("_blocks", "", kinds.experts_mxfp4),
)
_BY_DTYPE: dict[str, Handler] = {
    "F8_E4M3": kinds.float8,
    "F8_E5M2": kinds.float8,
    "I8": kinds.integers8,
    "U8": kinds.bytes8,
}


def decode_quantized(
    config: dict[str, Any], tensors: Mapping[str, StoredTensor], where: str
) -> tuple[dict[str, Any], dict[str, SourceTensor], list[str]]:
    """The configuration without its quantization, the tensors of the model that is meant, and what to note.

    A model that is stored whole stays as it is. Raises ConvertError for a method that is not decoded here, and for
    codes whose scales are missing or do not fit.
    """
    stated = config.get(KEY)
    said: Mapping[str, Any] = stated if isinstance(stated, dict) else {}
    finder = _Finder(tensors, said)
    if finder.has_codes:
        _check_methods(said, where)
    decoders, used = finder.decoders()
    if not decoders:
        return config, dict(tensors), []
    empty = finder.empty_biases(decoders)
    used |= empty
    dtype = _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."), "BF16")
    whole = {name: tensor for name, tensor in tensors.items() if name not in used}
    of_inputs = [name for name in whole if _OF_INPUTS.search(name)]
    if refused := next(filter(_NOT_WEIGHTS_ALONE.search, whole), None):
        raise ConvertError(
            f"the inputs of quantized modules are multiplied, too, which no format here takes over: {refused!r}",
            f"{where}: {KEY}",
            "convert the original checkpoint, or another quantized release of the model",
        )
    found: dict[str, SourceTensor] = {name: tensor for name, tensor in whole.items() if name not in of_inputs}
    for name, decoder in decoders.items():
        if name in found:
            raise ConvertError(
                f"{name!r} is stored whole and in codes as well", where, "fetch the weights again, or take one out"
            )
        found[name] = DecodedTensor.of(decoder, dtype)
    notes = _notes(decoders, len(of_inputs))
    if empty:
        notes.append(f"{len(empty)} biases of zeros, as AutoGPTQ stores them with every matrix, are left out")
    return _without_quantization(config), found, notes


def _check_methods(stated: Mapping[str, Any], where: str) -> None:
    """Raises ConvertError for a method, and for a format of compressed-tensors, that is not decoded here."""
    groups = stated.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    sparsity = stated.get("sparsity_config")
    formats = [stated.get("format"), *(group.get("format") for group in groups)]
    formats.append(sparsity.get("format") if isinstance(sparsity, dict) else None)
    for what, names, known in (
        ("", [stated.get("quant_method")], DECODED_METHODS),
        ("compressed-tensors' ", formats, _DECODED_FORMATS),
    ):
        for name in names:
            if name is not None and name not in known:
                raise ConvertError(
                    f"the checkpoint is quantized already, by {what}{name!r}, which is not decoded here",
                    f"{where}: {KEY}",
                    f"convert the original checkpoint, or a release quantized by one of {', '.join(known)}",
                )


class _Finder:
    def __init__(self, tensors: Mapping[str, StoredTensor], stated: Mapping[str, Any]):
        self.tensors, self.stated = tensors, stated

    @property
    def has_codes(self) -> bool:
        """Whether anything is stored in a dtype that no weight, mask or index has."""
        return any(tensor.dtype in (*_BY_DTYPE, "I16", "I32") for tensor in self.tensors.values())

    def decoders(self) -> tuple[dict[str, Decoder], set[str]]:
        """Name of a weight -> how it is decoded; and all names that are stored of these."""
        decoders: dict[str, Decoder] = {}
        used: set[str] = set()
        for stored, tensor in self.tensors.items():
            name, handler = self._handler(stored, tensor)
            if handler is None or stored in used or self._is_side(stored):
                continue
            sides = Sides(self.tensors, name, tensor)
            decoder = handler(sides, tensor, self.stated)
            if decoder is not None:
                decoders[name] = decoder
                used |= {stored, *sides.used}
        return decoders, used

    def empty_biases(self, decoders: Mapping[str, Decoder]) -> set[str]:
        """AutoGPTQ has stored a bias with every matrix, of zeros where the model has none. Raises WeightsAreNeeded."""
        if self.stated.get("quant_method") not in ("gptq", "gptqmodel"):
            return set()
        biases = [name.removesuffix("weight") + "bias" for name in decoders]
        if not all(name in self.tensors for name in biases):
            return set()
        contents = {name: Sides({}, name, self.tensors[name]).contents(self.tensors[name]) for name in biases}
        return {name for name, content in contents.items() if not any(content)}

    def _handler(self, stored: str, tensor: StoredTensor) -> tuple[str, Handler | None]:
        """The weight's name, and what decodes it."""
        for end, replacement, handler in _BY_END:
            if stored.endswith(end):
                return stored.removesuffix(end) + replacement, handler
        if stored.endswith(".qweight") and tensor.dtype == "I32" and len(tensor.shape) == 2:
            return stored.removesuffix("qweight") + "weight", self._of_groups(stored)
        return stored, _BY_DTYPE.get(tensor.dtype)

    def _is_side(self, stored: str) -> bool:
        """Whether a tensor of eight bits is the scale of another one, and no weight."""
        ends = ("_scale", "_scale_inv", "_scales", "_zero_point", ".absmax", ".nested_absmax", "weight_format")
        return stored.endswith(ends) or ".quant_state." in stored

    def _of_groups(self, stored: str) -> Handler:
        """GPTQ's or AWQ's, whose tensors have the same names. Raises ConvertError where neither is stated."""
        method, packing = self.stated.get("quant_method"), str(self.stated.get("packing_format", ""))
        version = str(self.stated.get("version", "gemm")).lower()
        if method == "awq" or "awq" in packing:
            if version != "gemm":
                raise _unknown_packing(stored, f"AWQ's version {version!r}")
            return kinds.awq
        if method not in ("gptq", "gptqmodel", "auto-round", "intel/auto-round"):
            raise _unknown_packing(stored, "a method that no quantization_config names")
        newer = self.stated.get("checkpoint_format") == "gptq_v2" or packing.endswith("gptqmodel")
        if self.stated.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
            raise _unknown_packing(stored, f"GPTQ's format {self.stated['checkpoint_format']!r}")
        offset = 0 if newer else 1
        return lambda sides, codes, stated: kinds.gptq(sides, codes, stated, offset)


def _unknown_packing(stored: str, what: str) -> ConvertError:
    return ConvertError(
        f"{stored!r} is packed by {what}, which is not decoded here",
        KEY,
        "convert the original checkpoint, or give the configuration that belongs to these weights",
    )


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    whole = {key: value for key, value in config.items() if key != KEY}
    if isinstance(text := whole.get("text_config"), dict):
        whole["text_config"] = {key: value for key, value in text.items() if key != KEY}
    return whole


def _notes(decoders: Mapping[str, Decoder], n_of_inputs: int) -> list[str]:
    counts = Counter(decoder.kind for decoder in decoders.values())
    if len(counts) == 1:
        said = next(iter(counts))
    else:
        said = ", ".join(f"{kind} ({n} tensors)" for kind, n in counts.most_common())
    notes = [f"weights are {said}: decoded on reading, calibration runs on the decoded weights"]
    if n_of_inputs:
        notes.append(f"{n_of_inputs} stored scales of inputs and caches are left out: they are measured anew")
    return notes
