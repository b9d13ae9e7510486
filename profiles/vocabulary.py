"""The words decisions are made in: what a tensor is, and what a model is made of. Plain frozen dataclasses."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from gguf.gguf_writer import GGUFValue

from bitwright.profiles.layout import AS_STORED, Layout


class Role(StrEnum):
    """The structural place of a tensor; profiles speak in roles, never in substrings of names."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    NORM = "norm"
    BIAS = "bias"
    ROPE = "rope"
    ROUTER = "router"
    SCALE = "scale"
    ATTENTION_QUERY = "attention_query"
    ATTENTION_KEY = "attention_key"
    ATTENTION_VALUE = "attention_value"
    ATTENTION_QKV = "attention_qkv"
    ATTENTION_OUTPUT = "attention_output"
    ATTENTION_GATE = "attention_gate"
    ATTENTION_QUERY_DOWN = "attention_query_down"
    ATTENTION_QUERY_UP = "attention_query_up"
    ATTENTION_LATENT = "attention_latent"
    ATTENTION_KEY_UP = "attention_key_up"
    ATTENTION_VALUE_UP = "attention_value_up"
    ATTENTION_KEY_VALUE_UP = "attention_key_value_up"
    ATTENTION_INDEXER = "attention_indexer"
    SSM_INPUT = "ssm_input"
    SSM_OUTPUT = "ssm_output"
    SSM_PARAMETERS = "ssm_parameters"
    SSM_STEP = "ssm_step"
    SSM_DECAY = "ssm_decay"
    CONV_INPUT = "conv_input"
    CONV_OUTPUT = "conv_output"
    MLP_GATE = "mlp_gate"
    MLP_UP = "mlp_up"
    MLP_GATE_UP = "mlp_gate_up"
    MLP_DOWN = "mlp_down"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    SHARED_EXPERT_GATE = "shared_expert_gate"
    SHARED_EXPERT_UP = "shared_expert_up"
    SHARED_EXPERT_DOWN = "shared_expert_down"
    PER_LAYER_EMBEDDING = "per_layer_embedding"
    PER_LAYER_PROJECTION = "per_layer_projection"
    MTP = "mtp"
    SSM_STATE = "ssm_state"
    CONV = "conv"
    SINK = "sink"
    POSITION = "position"
    OTHER = "other"


UNQUANTIZED_ROLES = frozenset(
    {
        *(Role.NORM, Role.BIAS, Role.ROPE, Role.ROUTER, Role.SCALE),
        *(Role.SSM_STATE, Role.CONV, Role.SINK, Role.POSITION, Role.OTHER),
    }
)
"""Tensors that runtimes compute with in float32, a few values each, and what is no part of the text model: never
quantized."""

UP_OF_DOWN = {
    Role.MLP_DOWN: Role.MLP_UP,
    Role.EXPERT_DOWN: Role.EXPERT_UP,
    Role.SHARED_EXPERT_DOWN: Role.SHARED_EXPERT_UP,
}
"""Projection from the neurons of an MLP back to the residual stream -> the one that the gate multiplies before it."""

DOWN_ROLES = frozenset(UP_OF_DOWN)

EXPERT_ROLES = frozenset({Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN})
"""Matrices of the experts that a router chooses among."""

SHARED_EXPERT_ROLES = frozenset({Role.SHARED_EXPERT_GATE, Role.SHARED_EXPERT_UP, Role.SHARED_EXPERT_DOWN})
"""Matrices of the expert that every token reaches."""

# Where the values of a tensor come from.
#   stored    from the checkpoint's tensors, as its layout says
#   constant  no source: they are computed from the configuration (rope factors)
#   scale     no source: the second-level scales of the matrices of the tensor before it, found when that is encoded
Origin = Literal["stored", "constant", "scale"]


@dataclass(frozen=True)
class Rescaled:
    """A row or a column of one matrix that is stored multiplied by a factor, which another tensor makes up for; index:
    within the matrix. Of a vector the values are columns."""

    axis: Literal["row", "column"]
    matrix: int
    index: int
    factor: float


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the artifact and where it comes from.

    name: GGUF name, e.g. "blk.0.attn_q.weight".
    shape: slowest dimension first: (n_values,), (n_rows, n_columns) or (n_experts, n_rows, n_columns).
    sources: names of the checkpoint's tensors: one, or one per expert for a stacked tensor; none for a constant.
    Several tensors may have a source in common, of which each takes a part.
    layer: index of the decoder layer, None outside of the layers: as of those that predict several tokens (MTP).
    layout: how it is made of each of its sources. stored_shape: of each of these; () where it is that of the tensor, or
    of one matrix of a stacked one.
    constant: the values of a constant tensor, in order.
    rescaled: what is multiplied after the transform; the function of the network stays the same.
    scale_applied: the runtime multiplies products with it by its second-level scales, where it has some.
    kept: the format that it keeps, of a tensor whose use nobody here knows; empty where a plan decides.
    module: transformers' own name of its module, where the stored one is another; empty where they are the same.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    sources: tuple[str, ...] = ()
    origin: Origin = "stored"
    layout: Layout = AS_STORED
    stored_shape: tuple[int, ...] = ()
    constant: tuple[float, ...] = ()
    rescaled: tuple[Rescaled, ...] = ()
    scale_applied: bool = False
    kept: str = ""
    module: str = ""

    @property
    def n_columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_weights(self) -> int:
        n = 1
        for dimension in self.shape:
            n *= dimension
        return n

    @property
    def n_rows(self) -> int:
        """Rows over all matrices of the tensor."""
        return self.n_weights // self.n_columns

    @property
    def n_matrices(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def quantizable(self) -> bool:
        """Whether a plan may give it any format that fits its rows."""
        return len(self.shape) > 1 and self.role not in UNQUANTIZED_ROLES


@dataclass(frozen=True)
class ModelMap:
    """What the model is made of, in the order of the artifact's file.

    architecture: GGUF architecture name ("llama"); n_layers: decoder layers.
    metadata: the artifact's key-value pairs that describe the model and its tokenizer, in order of writing.
    source_notes: what of the checkpoint is left out or read otherwise than it says, a sentence each, for the plan.
    gguf_notes: the same of what llama.cpp will do otherwise than the checkpoint says.
    predicts_tokens: whether the model has a head for the next token; not, where it embeds texts.
    """

    architecture: str
    n_layers: int
    tensors: tuple[TensorSpec, ...]
    metadata: dict[str, GGUFValue] = field(default_factory=dict)
    source_notes: tuple[str, ...] = ()
    gguf_notes: tuple[str, ...] = ()
    predicts_tokens: bool = True

    @property
    def notes(self) -> tuple[str, ...]:
        return self.source_notes + self.gguf_notes

    def tensor(self, name: str) -> TensorSpec:
        return next(t for t in self.tensors if t.name == name)
