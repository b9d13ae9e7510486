"""What a decoder is made of by transformers' own model of it: which stored tensors are the weights of linear modules,
as the schemes of a directory take them; and without a data file what they are, by the names of the modules.

Only a matrix of which both is known may be quantized. What is stored transposed, or of all experts in one tensor, and
products of unknown use stay as the source has them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import Keys
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from bitwright.converter.architectures.description import COMPUTED
from bitwright.converter.architectures.refusal import unsupported
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.source_config import check_unquantized
from bitwright.converter.tokenizer.chat_templates import DEFAULT, chat_templates
from bitwright.converter.tokenizer.files import TokenizerFiles
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.stored_tensor import SourceTensor
from bitwright.profiles.vocabulary import ModelMap, Role, TensorSpec

if TYPE_CHECKING:
    from bitwright.calibration.stream.anatomy.stored_names import StoredMatrices

_MLP = {
    Role.MLP_GATE: ("gate_proj", "w1"),
    Role.MLP_UP: ("up_proj", "w3", "fc1", "c_fc", "dense_h_to_4h"),
    Role.MLP_DOWN: ("down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h", "output_linear"),
    Role.MLP_GATE_UP: ("gate_up_proj", "input_linear"),
}
_ATTENTION = {
    Role.ATTENTION_QUERY: ("q_proj", "query", "wq"),
    Role.ATTENTION_KEY: ("k_proj", "key", "wk"),
    Role.ATTENTION_VALUE: ("v_proj", "value", "wv"),
    Role.ATTENTION_QKV: ("qkv_proj", "query_key_value", "in_proj_qkv", "in_proj_qkvz", "Wqkv"),
    Role.ATTENTION_OUTPUT: ("o_proj", "out_proj", "dense", "wo", "Wo"),
    Role.ATTENTION_GATE: ("gate_proj", "g_proj", "g_a_proj", "g_b_proj", "in_proj_z", "linear_gate"),
    Role.ATTENTION_QUERY_DOWN: ("q_a_proj",),
    Role.ATTENTION_QUERY_UP: ("q_b_proj",),
    Role.ATTENTION_LATENT: ("kv_a_proj_with_mqa",),
    Role.ATTENTION_KEY_VALUE_UP: ("kv_b_proj",),
    Role.SSM_DECAY: ("in_proj_a", "in_proj_b", "in_proj_ba", "b_proj", "f_a_proj", "f_b_proj"),
}
_SSM = {
    Role.SSM_INPUT: ("in_proj",),
    Role.SSM_OUTPUT: ("out_proj",),
    Role.SSM_PARAMETERS: ("x_proj",),
    Role.SSM_STEP: ("dt_proj",),
}
_CONV = {Role.CONV_INPUT: ("in_proj",), Role.CONV_OUTPUT: ("out_proj",)}
_MIXER = {**_SSM, **_ATTENTION, **_MLP}  # of a layer that has one part under one name; an output is an output

# Part of a module's name above its last -> roles by the last one; the first that matches.
_PARTS: tuple[tuple[str, Mapping[Role, Sequence[str]]], ...] = (
    (r"mamba|ssm", _SSM),
    (r"conv", _CONV),
    (r"attn|attention|temporal_block", _ATTENTION),
    (r"mixer", _MIXER),
    (r"mlp|feed_forward|ffn|moe|experts?$", _MLP),
    (r"^intermediate$", {Role.MLP_UP: ("dense",)}),  # of BERT's relatives
    (r"^output$", {Role.MLP_DOWN: ("dense",)}),
)
_ROUTER = re.compile(r"(^|\.)(\w*router\w*(\..*)?|gate|shared_expert_gate)$")
_INDEXER = re.compile(r"\bindexer\b")
_SHARED = re.compile(r"shared_(expert|mlp)")
_PER_LAYER = re.compile(r"(^|\.)per_layer_\w+$")
_STATES = ("A", "A_log", "D", "dt_bias")
# The first number of a parameter's name in a text model.
_LAYER = re.compile(r"\.(\d+)\.")
_EXPERTS = {Role.MLP_GATE: Role.EXPERT_GATE, Role.MLP_UP: Role.EXPERT_UP, Role.MLP_DOWN: Role.EXPERT_DOWN}
_SHARED_EXPERTS = {
    Role.MLP_GATE: Role.SHARED_EXPERT_GATE,
    Role.MLP_UP: Role.SHARED_EXPERT_UP,
    Role.MLP_DOWN: Role.SHARED_EXPERT_DOWN,
}
_NAMED = 4


def describe_decoder(checkpoint: Checkpoint) -> ModelMap:
    """The map of a model without a data file, under the names that its tensors are stored by.

    Raises ConvertError for a model that transformers does not have as a text model, for weights that are quantized, and
    for one of transformers' matrices that is not stored.
    """
    modules = _Modules(checkpoint)
    notes = [*checkpoint.notes, *check_unquantized(checkpoint.config, modules.used, modules.where)]
    tensors = modules.tensors()
    kept = [tensor.name for tensor in tensors if len(tensor.shape) > 1 and tensor.role is Role.OTHER]
    if kept:
        more = f" and {len(kept) - _NAMED} more" if len(kept) > _NAMED else ""
        notes.append(
            f"{len(kept)} tensors are no products of known use and stay as they are: {', '.join(kept[:_NAMED])}{more}"
        )
    if modules.wants_single_experts:
        notes.append(
            "transformers reads a quantized model of this kind with single experts only, and here they are one tensor:"
            " vLLM reads it"
        )
    n_layers = 1 + max((tensor.layer for tensor in tensors if tensor.layer is not None), default=-1)
    return ModelMap(
        checkpoint.config["model_type"],
        n_layers,
        tensors,
        _chat(checkpoint),
        tuple(notes),
        predicts_tokens=modules.head is not None,
    )


@dataclass(frozen=True)
class RuntimeModule:
    """What transformers makes of a stored tensor. is_product: it is the weight of a linear module, or one expert's
    among those that transformers stacks itself. name: of the module, where it is stored under another; empty otherwise.
    """

    is_product: bool
    name: str


def runtime_modules(checkpoint: Checkpoint) -> dict[str, RuntimeModule]:
    """Of every stored tensor of the text model.

    Raises as describe_decoder does, and for experts that transformers reads as one tensor only.
    """
    modules = _Modules(checkpoint)
    modules.check_experts()
    return {name: modules.of(parameter, name, stored) for parameter, name, stored in modules.stored()}


def _built(checkpoint: Checkpoint, where: str) -> tuple[Any, Any]:
    """transformers' configuration of the whole model, and its text model without weights."""
    import torch

    from bitwright.calibration.stream.build import build_without_weights, load_config

    try:
        whole = load_config(checkpoint.location)
        return whole, build_without_weights(whole, torch.float32, torch.device("meta"))
    except ConvertError:
        raise unsupported(checkpoint.config, where) from None


class _Modules:
    """The parameters of transformers' model beside what is stored of them."""

    def __init__(self, checkpoint: Checkpoint):
        from bitwright.calibration.stream.anatomy.stored_names import locate_parameters

        self.checkpoint, self.where = checkpoint, str(checkpoint.location / "config.json")
        whole, self.model = _built(checkpoint, self.where)
        names = [name for name in checkpoint.tensors if not COMPUTED.search(name)]
        self.located: Mapping[str, StoredMatrices] = locate_parameters(self.model, whole, names)
        self.modules = dict(self.model.named_modules())
        self.embedding, self.head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.tied = bool(getattr(self.model.config, "tie_word_embeddings", False))

    def stored(self) -> "Iterator[tuple[str, str, StoredMatrices]]":
        """Every stored tensor with the parameter that it is part of, and all that is stored of that."""
        for parameter, stored in self.located.items():
            for names in stored.names:
                for name in names:
                    yield parameter, name, stored

    @property
    def used(self) -> dict[str, SourceTensor]:
        return {name: self.checkpoint.tensors[name] for _, name, _ in self.stored()}

    @property
    def wants_single_experts(self) -> bool:
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

        return any(type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION for module in self.modules.values())

    def tensors(self) -> tuple[TensorSpec, ...]:
        """In the order in which the checkpoint stores them."""
        self._check_whole()
        specs = {name: self._spec(parameter, name, stored) for parameter, name, stored in self.stored()}
        return tuple(specs[name] for name in self.checkpoint.tensors if name in specs)

    def check_experts(self) -> None:
        """Raises ConvertError for single experts, made of a tensor of all, that transformers would not stack again."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        conversions = [c for c in get_model_conversion_mapping(self.model) if isinstance(c, WeightConverter)]
        stacks = any(".experts.*." in f".{pattern}" for c in conversions for pattern in c.source_patterns)
        single = any(_is_experts(parameter) and len(of.names) > 1 for parameter, of in self.located.items())
        if single and not stacks:
            raise ConvertError(
                f"transformers has the experts of a layer of {self.checkpoint.config.get('model_type')!r} in one tensor"
                " and reads no single ones, as the schemes of a directory take them",
                self.where,
                "choose a profile whose target is a GGUF",
            )

    def of(self, parameter: str, name: str, stored: "StoredMatrices") -> RuntimeModule:
        from torch import nn

        module_name, _, attribute = parameter.rpartition(".")
        module, shape = self.modules[module_name], self.checkpoint.tensors[name].shape
        expert = _is_experts(parameter) and len(stored.names) > 1 and len(shape) == 2
        linear = isinstance(module, nn.Linear) and attribute == "weight" and stored.names == ((name,),)
        same = _in_layer(name.removesuffix(f".{attribute}")) == _in_layer(module_name)
        is_product = expert or (linear and shape == tuple(module.weight.shape))
        return RuntimeModule(is_product, "" if same or expert else module_name)

    def _check_whole(self) -> None:
        """Raises ConvertError for a matrix that transformers would fill with random numbers."""
        from torch import nn

        for name, module in self.modules.items():
            if isinstance(module, nn.Linear) and f"{name}.weight" not in self.located:
                if module is self.head and self.tied:
                    continue
                raise ConvertError(
                    f"the checkpoint lacks the tensor of transformers' {name}.weight",
                    str(self.checkpoint.location),
                    "fetch the weights again; see config.json",
                )

    def _spec(self, parameter: str, name: str, stored: "StoredMatrices") -> TensorSpec:
        module = self.modules[parameter.rpartition(".")[0]]
        runtime, shape = self.of(parameter, name, stored), self.checkpoint.tensors[name].shape
        role = self._role(parameter, name, runtime.is_product) or Role.OTHER
        layer = _layer_of(parameter) if module is not self.embedding else None
        return TensorSpec(name, shape, role, layer, (name,), module=runtime.name)

    def _role(self, parameter: str, name: str, is_product: bool) -> Role | None:
        from torch import nn

        module_name, _, attribute = parameter.rpartition(".")
        module = self.modules[module_name]
        outside = {self.embedding: Role.EMBEDDING, self.head: Role.OTHER if self.tied else Role.OUTPUT}
        role: Role | None = None
        if attribute in _STATES:
            role = Role.SSM_STATE
        elif attribute.endswith("bias"):
            role = Role.BIAS
        elif len(self.checkpoint.tensors[name].shape) <= 1 or "norm" in module_name.rpartition(".")[2]:
            role = Role.NORM
        elif module in outside:
            role = outside[module]
        elif isinstance(module, nn.Embedding):
            role = Role.POSITION
        elif _ROUTER.search(module_name):
            role = Role.ROUTER
        elif is_product and _is_experts(parameter):  # each by its own name
            role = _EXPERTS.get(_by_name(name.removesuffix(".weight")) or Role.OTHER)
        elif is_product:
            role = _by_name(module_name)
        elif isinstance(module, nn.Conv1d):
            role = Role.CONV
        return role


def _is_experts(parameter: str) -> bool:
    return parameter.rpartition(".")[0].endswith("experts")


def _by_name(module: str) -> Role | None:
    """The role of a product by the name of its module; None for one that says nothing."""
    parent, _, last = module.rpartition(".")
    if _INDEXER.search(module):
        return Role.ATTENTION_INDEXER
    if _PER_LAYER.search(module):
        return Role.PER_LAYER_PROJECTION
    own = parent[match.end() :] if (match := _LAYER.search(parent + ".")) else parent
    for part, table in _PARTS:
        if re.search(part, own):
            role = next((role for role, names in table.items() if last in names), None)
            return _SHARED_EXPERTS.get(role, role) if role is not None and _SHARED.search(own) else role
    return None


def _layer_of(parameter: str) -> int | None:
    return int(match[1]) if (match := _LAYER.search(parameter)) else None


def _in_layer(module: str) -> str:
    """What of a module's name every runtime has: from its layer on, or its last part."""
    match = _LAYER.search(module)
    return module[match.start() :] if match else module.rpartition(".")[2]


def _chat(checkpoint: Checkpoint) -> dict[str, GGUFValue]:
    """The key by which it is known that calibration can render conversations."""
    templates, _ = chat_templates(TokenizerFiles.read(checkpoint.location))
    if DEFAULT not in templates:
        return {}
    return {Keys.Tokenizer.CHAT_TEMPLATE: GGUFValue(templates[DEFAULT], GGUFValueType.STRING)}
