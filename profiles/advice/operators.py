"""What a step computes and reads, operator by operator: from a plan's rows and a model's attention."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from bitwright.profiles.advice.cache import Cache, CacheFormat
from bitwright.profiles.vocabulary import EXPERT_ROLES, Role


class OperatorType(StrEnum):
    """The seventeen kinds of operators of the specification, and state spaces, which it does not have."""

    Q_PROJ = "q_proj"
    K_PROJ = "k_proj"
    V_PROJ = "v_proj"
    O_PROJ = "o_proj"
    QK_MATMUL = "qk_matmul"
    SV_MATMUL = "sv_matmul"
    SOFTMAX = "softmax"
    FFN_GATE = "ffn_gate"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    EXPERTS = "experts"
    ROUTER = "router"
    KV_CACHE = "kv_cache"
    RMSNORM = "rmsnorm"
    ROPE = "rope"
    EMBEDDINGS = "embeddings"
    LM_HEAD = "lm_head"
    STATE_SPACE = "state_space"


_TYPES: dict[Role, OperatorType] = {
    Role.EMBEDDING: OperatorType.EMBEDDINGS,
    Role.OUTPUT: OperatorType.LM_HEAD,
    Role.NORM: OperatorType.RMSNORM,
    Role.BIAS: OperatorType.ROPE,
    Role.ROPE: OperatorType.ROPE,
    Role.ROUTER: OperatorType.ROUTER,
    Role.SCALE: OperatorType.RMSNORM,
    Role.ATTENTION_QUERY: OperatorType.Q_PROJ,
    Role.ATTENTION_KEY: OperatorType.K_PROJ,
    Role.ATTENTION_VALUE: OperatorType.V_PROJ,
    Role.ATTENTION_QKV: OperatorType.Q_PROJ,
    Role.ATTENTION_OUTPUT: OperatorType.O_PROJ,
    Role.ATTENTION_GATE: OperatorType.O_PROJ,
    Role.ATTENTION_QUERY_DOWN: OperatorType.Q_PROJ,
    Role.ATTENTION_QUERY_UP: OperatorType.Q_PROJ,
    Role.ATTENTION_LATENT: OperatorType.K_PROJ,
    Role.ATTENTION_KEY_UP: OperatorType.K_PROJ,
    Role.ATTENTION_VALUE_UP: OperatorType.V_PROJ,
    Role.ATTENTION_KEY_VALUE_UP: OperatorType.V_PROJ,
    Role.ATTENTION_INDEXER: OperatorType.K_PROJ,
    Role.MLP_GATE: OperatorType.FFN_GATE,
    Role.MLP_UP: OperatorType.FFN_UP,
    Role.MLP_GATE_UP: OperatorType.FFN_GATE,
    Role.MLP_DOWN: OperatorType.FFN_DOWN,
    Role.SHARED_EXPERT_GATE: OperatorType.FFN_GATE,
    Role.SHARED_EXPERT_UP: OperatorType.FFN_UP,
    Role.SHARED_EXPERT_DOWN: OperatorType.FFN_DOWN,
    Role.EXPERT_GATE: OperatorType.EXPERTS,
    Role.EXPERT_UP: OperatorType.EXPERTS,
    Role.EXPERT_DOWN: OperatorType.EXPERTS,
    Role.PER_LAYER_EMBEDDING: OperatorType.EMBEDDINGS,
    Role.PER_LAYER_PROJECTION: OperatorType.FFN_UP,
    Role.SSM_INPUT: OperatorType.STATE_SPACE,
    Role.SSM_OUTPUT: OperatorType.STATE_SPACE,
    Role.SSM_PARAMETERS: OperatorType.STATE_SPACE,
    Role.SSM_STEP: OperatorType.STATE_SPACE,
    Role.SSM_DECAY: OperatorType.STATE_SPACE,
    Role.SSM_STATE: OperatorType.STATE_SPACE,
    Role.CONV: OperatorType.STATE_SPACE,
    Role.CONV_INPUT: OperatorType.STATE_SPACE,
    Role.CONV_OUTPUT: OperatorType.STATE_SPACE,
    Role.SINK: OperatorType.SOFTMAX,
    Role.MTP: OperatorType.FFN_UP,
    Role.POSITION: OperatorType.EMBEDDINGS,
    Role.OTHER: OperatorType.RMSNORM,
}
"""Every role; a fused matrix goes by what the most of it is."""

GROUPS: dict[str, tuple[OperatorType, ...]] = {
    "attention weights": (OperatorType.Q_PROJ, OperatorType.K_PROJ, OperatorType.V_PROJ, OperatorType.O_PROJ),
    "MLP weights": (OperatorType.FFN_GATE, OperatorType.FFN_UP, OperatorType.FFN_DOWN),
    "experts": (OperatorType.EXPERTS, OperatorType.ROUTER),
    "state space": (OperatorType.STATE_SPACE,),
    "output": (OperatorType.LM_HEAD, OperatorType.EMBEDDINGS),
    "keys and values": (
        *(OperatorType.KV_CACHE, OperatorType.QK_MATMUL, OperatorType.SV_MATMUL, OperatorType.SOFTMAX),
    ),
    "norms": (OperatorType.RMSNORM, OperatorType.ROPE),
}
"""What is shown together."""

_LOOKED_UP = frozenset({Role.EMBEDDING, Role.PER_LAYER_EMBEDDING, Role.POSITION})
_SOFTMAX_OPERATIONS = 5  # a score: largest, difference, exponential, sum, quotient


@dataclass(frozen=True)
class Row:
    """A tensor of a plan. rows: of the matrix; n_bytes: with the scales that are stored beside it. kept_out: no part of
    the text model."""

    role: Role
    n_weights: int
    n_bytes: int
    rows: int
    kept_out: bool = False


@dataclass(frozen=True)
class Experts:
    """count: in a layer; used: for a token."""

    count: int = 0
    used: int = 0

    def touched(self, batch: int) -> float:
        """The share of the experts that so many tokens reach, if each chooses as if by lot."""
        return 1 - (1 - self.used / self.count) ** batch if self.count else 1.0

    @property
    def share(self) -> float:
        return self.used / self.count if self.count else 1.0


@dataclass(frozen=True)
class Operator:
    """One kind of operator in all layers: bytes that a step reads, operations that it computes. least_bytes: that it
    reads at least, where its texts have every expert in common."""

    type: OperatorType
    n_bytes: float
    operations: float
    least_bytes: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.n_bytes if self.n_bytes else 0.0


def step_operators(
    rows: Iterable[Row], cache: Cache, experts: Experts, kv: CacheFormat, context: int, batch: int
) -> tuple[Operator, ...]:
    """What a decode step of `batch` texts, each `context` tokens long, reads and computes.

    A matrix is read once for all texts, and computed with by each; of an embedding that is no head a row a text is
    read; of experts those that the texts reach.
    """
    tensors = [row for row in rows if not _left_alone(row)]
    tied = not any(row.role is Role.OUTPUT for row in tensors)
    sums: dict[OperatorType, list[float]] = {}

    def add(kind: OperatorType, n_bytes: float, operations: float, least_bytes: float | None = None) -> None:
        total = sums.setdefault(kind, [0.0, 0.0, 0.0])
        total[0] += n_bytes
        total[1] += operations
        total[2] += n_bytes if least_bytes is None else least_bytes

    for row in tensors:
        is_head = tied and row.role is Role.EMBEDDING
        if row.role in EXPERT_ROLES:
            operations = 2 * batch * row.n_weights * experts.share
            add(OperatorType.EXPERTS, row.n_bytes * experts.touched(batch), operations, row.n_bytes * experts.share)
        elif row.role in _LOOKED_UP and not is_head:
            add(OperatorType.EMBEDDINGS, batch * row.n_bytes / row.rows, 0)
        else:
            kind = OperatorType.LM_HEAD if is_head else _TYPES[row.role]
            add(kind, row.n_bytes, 2 * batch * row.n_weights)
    add(OperatorType.KV_CACHE, batch * cache.read(context, kv), 0)
    for layer in cache.layers:
        scores = batch * layer.heads * layer.seen(context)
        add(OperatorType.QK_MATMUL, 0, 2 * scores * layer.key)
        add(OperatorType.SV_MATMUL, 0, 2 * scores * layer.value)
        add(OperatorType.SOFTMAX, 0, _SOFTMAX_OPERATIONS * scores)
    return tuple(Operator(kind, *sums[kind]) for kind in OperatorType if kind in sums)


def operator_formats(tensors: Iterable[tuple[Role, str]]) -> dict[str, tuple[str, ...]]:
    """Operator -> the number formats of its tensors, in the order in which they come first."""
    found: dict[str, dict[str, None]] = {}
    for role, number_format in tensors:
        found.setdefault(_TYPES[role].value, {})[number_format] = None
    return {kind.value: tuple(found[kind.value]) for kind in OperatorType if kind.value in found}


def prompt_operations(rows: Iterable[Row], cache: Cache, experts: Experts, tokens: int) -> float:
    """Operations of a prompt of so many tokens: products with matrices, and causal attention. The head sees the last
    token alone."""
    products = 0.0
    for row in rows:
        if _left_alone(row) or row.role in _LOOKED_UP or row.role is Role.OUTPUT:
            continue
        products += 2 * row.n_weights * (experts.share if row.role in EXPERT_ROLES else 1.0)
    pairs = sum(layer.heads * (layer.key + layer.value) * _causal_pairs(tokens, layer.window) for layer in cache.layers)
    return products * tokens + 2 * pairs


def _left_alone(row: Row) -> bool:
    """Whether generating token by token reads nothing of it: layers that predict several tokens only draft."""
    return row.kept_out or row.role is Role.MTP


def _causal_pairs(tokens: int, window: int) -> float:
    """How many tokens the tokens of a prompt attend to, all together."""
    if not window or window >= tokens:
        return tokens * tokens / 2
    return window * window / 2 + (tokens - window) * window
