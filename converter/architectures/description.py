"""What a data file says of an architecture: what its checkpoints are made of, and what llama.cpp calls it.

docs/add-an-architecture.md explains each key of a file.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gguf import TensorNameMap

from bitwright.calibration.stream.anatomy.stored_names import WRAPPERS
from bitwright.converter.architectures.expression import Expression, Unknown
from bitwright.converter.architectures.pattern import Pattern
from bitwright.profiles.layout import Values
from bitwright.profiles.vocabulary import Role

# Buffers that old versions stored, of whatever dtype: runtimes compute them, and would not know the tensor.
COMPUTED = re.compile(
    r"\.rotary_emb(_local)?\.inv_freq$|(^|\.)position_ids$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$"
)

MTP = "the layers that predict several tokens at once (MTP)"
LEFT_OUT = {
    "the image encoder": (
        r"^(model\.)?(vision_tower|visual|vision_model|vision_encoder|vision_embed_tokens|multi_modal_projector|"
        r"mm_projector|embed_vision|image_newline|vision_projection|connector|patch_merger)\b"
    ),
    "the audio encoder": r"^(model\.)?(audio_tower|audio_encoder|embed_audio|audio_projection)\b",
    MTP: r"^(model\.)?mtp(_\w+)?\.",
}
"""What a text model does without -> its names."""

# Without a value these mean that there is none, or that it follows from others; any other key then has its default.
_MEANT_WITHOUT_VALUE = (
    *("num_key_value_heads", "sliding_window", "rope_theta"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)


@dataclass(frozen=True)
class TensorRule:
    """One kind of tensor of the artifact, made of one kind of tensor of the checkpoint.

    pattern: its name there, with {layer} and {expert} or {matrix} in the place of the indices.
    shape: sizes of its dimensions, slowest first; of one expert's matrix where the tensors are stacked.
    stored: those of the checkpoint's tensor; empty where they are the same.
    count: how many tensors are stacked under names with {matrix}; None for all experts, under names with {expert}.
    rows, columns, transposed, values, factors, observed: its layout, see profiles/layout.py.
    when: whether it is there; None where it always is. optional: it is there where it is stored.
    kind: of the layers that have it; empty for all.
    gguf: llama.cpp's name without the layer; empty for the one of gguf's own table.
    unused: what it is where it is stored and `when` says that the model does without: it is left out, with a note.
    """

    pattern: str
    role: Role
    shape: tuple[Expression, ...]
    stored: tuple[Expression, ...] = ()
    count: Expression | None = None
    rows: Pattern | None = None
    columns: Pattern | None = None
    transposed: bool = False
    values: Values = "same"
    factors: tuple[tuple[Expression, Expression], ...] = ()
    observed: Expression = Expression("True")  # noqa: RUF009 -- an expression never changes
    when: Expression | None = None
    kind: str = ""
    gguf: str = ""
    unused: str = ""
    optional: bool = False

    @property
    def stacked(self) -> bool:
        return "{expert}" in self.pattern or self.count is not None

    def gguf_name(self, names: TensorNameMap | None, layer: int | None) -> str:
        """llama.cpp's name of the tensor in that layer, None outside of the layers. names: gguf's table, None where it
        lacks the architecture. Raises ValueError where there is no name: the architecture's data file is wrong."""
        if self.gguf:
            return self.gguf if layer is None else f"blk.{layer}.{self.gguf}"
        name = self.pattern.replace(".{expert}", "").replace(".{matrix}", "").format(layer=layer)
        named = None if names is None else names.get_name(name, try_suffixes=(".weight", ".bias"))
        if named is None:
            raise ValueError(f"gguf has no name for {name!r}: the architecture's data file is wrong")
        return named


@dataclass(frozen=True)
class Equal:
    """A dimension that llama.cpp computes with in the place of a value of the configuration.

    of_layers: number of layers -> another dimension, where llama.cpp knows a model by that number."""

    dimension: str
    of_layers: dict[int, str] = field(default_factory=dict)


def _value(expression: Expression, config: Mapping[str, Any]) -> Any:
    """What the expression comes to; None where the configuration lacks what it is made of."""
    try:
        return expression.evaluate(config)
    except Unknown:
        return None


@dataclass(frozen=True)
class Architecture:
    """name: of the data file. gguf_name: llama.cpp's architecture. model_types: values of config.json's `model_type`;
    condition: on config.json, where another file has the others of these types.
    before, layer, after: the tensors before, in and after the decoder layers, in the order of the artifact.
    base: what the names of a model with a head begin with, and those of one that was saved without its head do not.
    prefixes: beginnings of names that some checkpoints use, and what they stand for, beside WRAPPERS.
    spellings: regular expressions of names that transformers reads as well, and what they are called here instead.
    left_out: what the artifact does without, beside LEFT_OUT -> a regular expression of its names.
    extra_layers: whether layers beyond the configuration's number are stored, which predict several tokens (MTP), and
    llama.cpp does not run. mtp: the first of them is run, and may be stored under names of its own: regular expressions
    -> what they are in that layer, whose index is {layer}; None where llama.cpp runs none.
    aliases: keys of config.json that this architecture has for others.
    defaults: values of config.json that its authors may leave out, as transformers assumes them.
    derived: keys of config.json that its authors may leave out -> what they are made of, in an order in which each is
    made of those before.
    per_layer: keys of config.json that are lists of a value a layer -> what each is, where they are left out; a key
    that ends in _of_layers is that of every layer, where per_layer_config may give one its own.
    requires: values that llama.cpp's implementation takes for granted.
    equal: key of the configuration -> the dimension that llama.cpp takes for it.
    refused: what llama.cpp computes otherwise, so that no file would be right, a sentence each -> when that is so, in
    any of the layers.
    rope: keys of the rope table that stand for others in transformers -> what each then is.
    dimensions: sizes beside the usual ones, or in their place, in an order in which each is made of those before.
    kinds: kinds of layers -> whether a layer is of that kind.
    rope_types: the rope scalings that llama.cpp implements for it; none where it has no rotary embedding. rope_keys:
    keys of a rope table that are read beside the usual ones. local_rope: whether rope_parameters has a table for each
    kind of layer.
    window_keys: keys by which transformers gives layers a sliding window, see windows.py. window_period:
    llama.cpp gives none to every so-manieth layer unless the file says otherwise; 0 where it computes no window.
    feeds: tensor of a layer -> the matrices that are multiplied with what it makes and nothing else is, see
    smoothing/groups.py; names like the rules'.
    scales_applied: the roles whose products llama.cpp multiplies with second-level scales.
    scales_applied_without_bias: those whose products it does so where it adds no bias to them, and ends where it does.
    metadata: GGUF key (without the architecture's prefix) -> its value's type and what it is; a type of lists has a
    value for each layer, or one that is a list.
    notes: what llama.cpp does otherwise, and a user can live with, a sentence each -> when that is so.
    yarn_attention: what llama.cpp multiplies cosines and sines with under yarn by itself; None for the usual.
    without: what does not work for it ("calibration", "gradients", "directory") -> why."""

    name: str
    gguf_name: str
    model_types: tuple[str, ...]
    before: tuple[TensorRule, ...]
    layer: tuple[TensorRule, ...]
    after: tuple[TensorRule, ...]
    condition: Expression | None = None
    base: str = "model."
    prefixes: dict[str, str] = field(default_factory=dict)
    spellings: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    extra_layers: bool = False
    mtp: dict[str, str] | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    derived: dict[str, Expression] = field(default_factory=dict)
    per_layer: dict[str, Expression] = field(default_factory=dict)
    requires: dict[str, Any] = field(default_factory=dict)
    equal: dict[str, Equal] = field(default_factory=dict)
    refused: dict[str, Expression] = field(default_factory=dict)
    rope: dict[str, Expression] = field(default_factory=dict)
    dimensions: dict[str, Expression] = field(default_factory=dict)
    kinds: dict[str, Expression] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ()
    rope_keys: tuple[str, ...] = ()
    local_rope: bool = False
    window_keys: tuple[str, ...] = ()
    window_period: int = 0
    feeds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    scales_applied: tuple[Role, ...] = ()
    scales_applied_without_bias: tuple[Role, ...] = ()
    metadata: dict[str, tuple[str, Expression]] = field(default_factory=dict)
    notes: dict[str, Expression] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    yarn_attention: Expression | None = None

    def completed(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration with what transformers assumes where it says nothing."""
        config = {self.aliases.get(key, key): value for key, value in config.items()}
        without = {key for key in _MEANT_WITHOUT_VALUE if key in config and config[key] is None}
        defaults = {key: value for key, value in self.defaults.items() if key not in without}
        completed = {**defaults, **{key: value for key, value in config.items() if value is not None}}
        for key, expression in self.derived.items():
            if completed.get(key) is None and (value := _value(expression, completed)) is not None:
                completed[key] = value
        return completed

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether this is the file of a model with that config.json."""
        if config.get("model_type") not in self.model_types:
            return False
        return self.condition is None or bool(_value(self.condition, config))

    def spelled(self, name: str) -> str:
        """The name that transformers would write where it reads this one, too."""
        for pattern, replacement in self.spellings.items():
            name = re.sub(pattern, replacement, name)
        return f"{self.base}{name}" if name.partition(".")[0] in self._first_parts else name

    def in_layers(self, name: str, n_layers: int) -> str:
        """The name of a stored tensor, with the layer that predicts several tokens as the one after the n_layers of
        the model."""
        for pattern, replacement in (self.mtp or {}).items():
            name = re.sub(pattern, replacement.replace("{layer}", str(n_layers)), name)
        return name

    def stores_mtp(self, names: Iterable[str], n_layers: int) -> bool:
        """Whether a layer that predicts several tokens, which llama.cpp runs, is among these tensors."""
        first = f"layers.{n_layers}."
        return self.mtp is not None and any(
            first in (self.canonical_name(inner) or "")
            for name in names
            if first in (inner := self.in_layers(name, n_layers))
        )

    def named(self, role: Role) -> str | None:
        """The only tensor of that role outside of the layers, as the rules spell it; None where there is none."""
        return next((rule.pattern for rule in (*self.before, *self.after) if rule.role is role), None)

    def canonical_name(self, name: str) -> str | None:
        """The name as the rules spell it; None for a tensor to ignore."""
        if COMPUTED.search(name) or self.part_left_out(name) is not None:
            return None
        for prefix, replacement in self.prefixes.items():
            if name.startswith(prefix):
                return replacement + name.removeprefix(prefix)
        for wrapper in WRAPPERS:
            if name.startswith(wrapper):
                rest = name.removeprefix(wrapper)
                return rest if rest.startswith("lm_head.") else f"model.{rest}"
        return name

    def part_left_out(self, name: str) -> str | None:
        """What of the model a tensor belongs to that the artifact does without; None for all others."""
        return next((what for what, pattern in self._left_out.items() if re.search(pattern, name)), None)

    @cached_property
    def stored_whole(self) -> frozenset[str]:
        """Last parts of the names of tensors with all experts of a layer, of which the rules speak as a whole."""
        return frozenset(
            rule.pattern.rpartition(".")[2] for rule in self.layer if ".experts." in rule.pattern and not rule.stacked
        )

    @cached_property
    def plain(self) -> bool:
        """Whether every size follows from the keys of a GGUF: each is a key of its own, and all layers are alike."""
        values = (value for kind, value in self.metadata.values())
        return not (self.kinds or self.dimensions or self.aliases) and all(map(Expression.is_name, values))

    @cached_property
    def needed(self) -> frozenset[str]:
        """The names that shapes, metadata and conditions are made of."""
        rules = (*self.before, *self.layer, *self.after)
        expressions = [*self.dimensions.values(), *(value for _, value in self.metadata.values())]
        expressions += [size for rule in rules for size in (*rule.shape, *rule.stored)]
        return frozenset(name for expression in expressions for name in expression.names())

    @cached_property
    def _left_out(self) -> dict[str, str]:
        return self.left_out | LEFT_OUT

    @cached_property
    def _first_parts(self) -> frozenset[str]:
        """First parts of the names of a model that was saved without its head (AutoModel)."""
        patterns = [rule.pattern for rule in (*self.before, *self.layer, *self.after)]
        beginning = self.base
        return frozenset(
            pattern.removeprefix(beginning).partition(".")[0]
            for pattern in patterns
            if beginning and pattern.startswith(beginning)
        )
