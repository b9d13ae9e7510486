"""The stage `describe`: from a Checkpoint to a ModelMap."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from math import prod
from typing import Any

from bitwright.converter.architectures.architecture import gguf_name_map, with_scales_applied
from bitwright.converter.architectures.description import MTP, TensorRule
from bitwright.converter.architectures.expression import Expression
from bitwright.converter.model.configuration import Configuration, configure
from bitwright.converter.model.gguf_map import describe_gguf
from bitwright.converter.model.metadata import model_metadata
from bitwright.converter.model.rope import rope_factors
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.known_cases import explain_names
from bitwright.converter.source.source_config import check_unquantized
from bitwright.converter.source.stored_tensors import by_name
from bitwright.converter.source.values import is_number, unusable
from bitwright.converter.tokenizer.vocabulary import tokenizer_metadata
from bitwright.formats.errors import ConvertError
from bitwright.profiles.layout import Layout
from bitwright.profiles.vocabulary import UNQUANTIZED_ROLES, ModelMap, Role, TensorSpec

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def describe(
    checkpoint: Checkpoint, pre_tokenizer: str | None = None, keeps_mtp: bool = True, *, with_tokenizer: bool = True
) -> ModelMap:
    """What the checkpoint is made of, in the order of the artifact: embedding, layers, output.

    pre_tokenizer: llama.cpp's name of the pre-tokenizer, for a tokenizer that cannot be recognised. keeps_mtp: whether
    the layer that predicts several tokens is part of the artifact, where llama.cpp runs it. with_tokenizer: False
    leaves it unread, which takes a second, and its keys out: for who asks what the tensors are.
    Raises ConvertError for an unknown architecture or tensor, a tensor that is absent or has another shape than the
    configuration says, quantized weights, and a configuration that llama.cpp does not implement.
    """
    if checkpoint.metadata is not None:
        return describe_gguf(checkpoint, keeps_mtp)
    where = str(checkpoint.location / "config.json")
    configuration = configure(checkpoint.config, where, checkpoint.tensors, keeps_mtp)
    describer = _Describer(checkpoint, configuration)
    notes = [*checkpoint.notes, *describer.check()]
    tensors = with_scales_applied([configuration.architecture], describer.tensors())
    metadata, about_card = model_metadata(checkpoint, configuration, tensors)
    tokenizer = None
    if with_tokenizer:
        tokenizer = tokenizer_metadata(checkpoint.location, configuration.dimensions["vocab"], pre_tokenizer)
    return ModelMap(
        configuration.architecture.gguf_name,
        configuration.dimensions["layers"],
        tensors,
        metadata | (tokenizer.values if tokenizer else {}),
        source_notes=(*notes, *about_card),
        gguf_notes=(*describer.left_out_notes, *configuration.notes, *(tokenizer.notes if tokenizer else ())),
        predicts_tokens=describer.predicts_tokens,
    )


class _Describer:
    """Matches the checkpoint's tensors with the architecture's rules."""

    def __init__(self, checkpoint: Checkpoint, configuration: Configuration):
        self.checkpoint, self.configuration = checkpoint, configuration
        self.architecture, self.dims = configuration.architecture, configuration.dimensions
        self.layers = range(self.dims["layers"] + self.dims["mtp_layers"])
        self.names = gguf_name_map(self.architecture.gguf_name, len(self.layers))
        self.facts: dict[int | None, dict[str, Any]] = {None: configuration.names()}
        self.facts |= {layer: configuration.names(layer) for layer in self.layers}
        self.left_out: Counter[str] = Counter()
        self.stored = by_name(self._kept_name, checkpoint.tensors, str(checkpoint.location))

    def check(self) -> list[str]:
        """Compares what is stored with what the configuration asks for, once; returns what to note.

        Raises ConvertError for weights that are quantized, and for tensors that are not stored or belong to no place.
        """
        expected = {name for rule, layer in self._rules() for name in self._wanted(rule, layer)}
        used = {own: self.checkpoint.tensors[own] for name, own in self.stored.items() if name in expected}
        notes = check_unquantized(self.checkpoint.config, used, self.configuration.where)
        missing, unknown = expected - self.stored.keys(), self.stored.keys() - expected
        unknown -= self._unused(unknown)
        if unknown:
            self._refuse_switched_off()
        self._refuse_partial_mtp(missing)
        if missing or unknown:
            model = self.checkpoint.model_id if self.checkpoint.fetch_weights else str(self.checkpoint.location)
            raise explain_names(missing, unknown, self.stored, self.dims["layers"], self.architecture.name, model)
        return notes

    @property
    def left_out_notes(self) -> list[str]:
        """What of the checkpoint is left out of a GGUF, a sentence each; once it is checked."""
        return [f"left out: {what} ({n} tensors)" for what, n in self.left_out.items()]

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model has a head. One that the artifact does without is the embedding, unless its rule says that
        it is unused."""
        heads = [rule for rule in self.architecture.after if rule.role is Role.OUTPUT]
        return any(self._has(rule, None) or not rule.unused for rule in heads)

    def tensors(self) -> Iterator[TensorSpec]:
        before = [rule for rule in self.architecture.before if self._has(rule, None)]
        for rule, layer in self._rules():
            yield self._spec(rule, layer)
            if rule is before[-1] and self.configuration.rope:
                for name, factors in rope_factors(self.configuration.rope, self.dims["rotary"]).items():
                    yield TensorSpec(name, (len(factors),), Role.ROPE, origin="constant", constant=factors)

    def _kept_name(self, stored: str) -> str | None:
        """The name as the rules spell it; None for what the artifact does without, which is counted."""
        architecture, inner = self.architecture, stored
        if self.dims["mtp_layers"]:
            inner = architecture.in_layers(stored, self.dims["layers"])
        name = architecture.canonical_name(inner)
        if name is None and (what := architecture.part_left_out(inner)) is not None:
            self.left_out[what] += 1
        beyond = architecture.extra_layers or architecture.mtp is not None
        match = _LAYER.search(name or "") if beyond else None
        if match is not None and int(match[1]) >= len(self.layers):
            self.left_out[MTP] += 1
            return None
        return name

    def _rules(self) -> Iterator[tuple[TensorRule, int | None]]:
        """The rules of the tensors that this model has, with their layers, in the order of the artifact."""
        for rule in self.architecture.before:
            if self._has(rule, None):
                yield rule, None
        for layer in self.layers:
            for rule in self.architecture.layer:
                if (not rule.kind or rule.kind in self.configuration.kinds[layer]) and self._has(rule, layer):
                    yield rule, layer
        for rule in self.architecture.after:
            tied = rule.role is Role.OUTPUT and self.configuration.values["tie_word_embeddings"]
            # Where a tied head is stored all the same, it is one of its own: see stored_tensors.
            if (not tied or rule.pattern in self.stored) and self._has(rule, None):
                yield rule, None

    def _has(self, rule: TensorRule, layer: int | None) -> bool:
        if rule.optional and rule.pattern.format(layer=layer) not in self.stored:
            return False
        return rule.when is None or bool(self.configuration.value(rule.when, self.facts[layer]))

    def _wanted(self, rule: TensorRule, layer: int | None) -> list[str]:
        n_stacked = self.dims["experts"] if rule.stacked else 1
        if rule.count is not None:
            n_stacked = self.configuration.size(rule.count, self.facts[layer])
        return [rule.pattern.format(layer=layer, expert=index, matrix=index) for index in range(n_stacked)]

    def _spec(self, rule: TensorRule, layer: int | None) -> TensorSpec:
        facts = self.facts[layer]
        shape = tuple(self.configuration.size(size, facts) for size in rule.shape)
        stored = tuple(self.configuration.size(size, facts) for size in rule.stored) or shape
        sources = tuple(self.stored[name] for name in self._wanted(rule, layer))
        for source in sources:
            self._check_shape(source, stored)
        n_rows, n_columns = (prod(stored[:-1]), stored[-1]) if len(stored) > 1 else (stored[0], 1)
        layout = Layout(
            None if rule.rows is None else rule.rows.selection(n_rows, facts),
            None if rule.columns is None else rule.columns.selection(n_columns, facts),
            rule.transposed,
            rule.values,
            tuple((self.configuration.size(n, facts), self._factor(by, facts)) for n, by in rule.factors),
            bool(self.configuration.value(rule.observed, facts)),
        )
        predicts_several = layer is not None and layer >= self.dims["layers"]
        return TensorSpec(
            name=rule.gguf_name(self.names, layer),
            shape=(len(sources), *shape) if rule.stacked else shape,
            role=Role.MTP if predicts_several and rule.role not in UNQUANTIZED_ROLES else rule.role,
            layer=None if predicts_several else layer,
            sources=sources,
            layout=layout,
            stored_shape=stored if stored != shape else (),
        )

    def _unused(self, unknown: set[str]) -> set[str]:
        """Those of these tensors that transformers reads past, as their rules say; counted as left out."""
        outside = [rule for rule in (*self.architecture.before, *self.architecture.after) if rule.unused]
        places: list[tuple[TensorRule, int | None]] = [(rule, None) for rule in outside]
        for layer in range(self.dims["layers"]):
            places += [(rule, layer) for rule in self.architecture.layer if rule.unused]
        unused = {name: rule.unused for rule, layer in places for name in self._wanted(rule, layer) if name in unknown}
        self.left_out.update(unused.values())
        return set(unused)

    def _factor(self, expression: Expression, facts: dict[str, Any]) -> float:
        factor = self.configuration.value(expression, facts)
        if not is_number(factor) or factor == 0:
            raise unusable(expression.text, factor, "which is no factor", self.configuration.where)
        return float(factor)

    def _refuse_switched_off(self) -> None:
        """Raises ConvertError for a tensor that is stored, and that the configuration says the model does without."""
        values = self.configuration.values
        for rule in self.architecture.layer:
            name = rule.pattern.format(layer=0, expert=0, matrix=0)
            if rule.when is not None and name in self.stored and not self._has(rule, 0):
                key = next(rule.when.names(), rule.when.text)
                raise ConvertError(
                    f"the checkpoint has {name!r}, and the configuration has {key} = {values.get(key)!r}:"
                    " transformers computes without it",
                    f"{self.configuration.where}: {key}",
                    f"set {key} to true if the model was trained with it, or take these tensors out",
                )

    def _refuse_partial_mtp(self, missing: Collection[str]) -> None:
        """Raises ConvertError for a layer that predicts several tokens of which something is not stored."""
        beyond = f"layers.{self.dims['layers']}."
        lacking = sorted(name for name in missing if beyond in name)
        if self.dims["mtp_layers"] and lacking:
            raise ConvertError(
                f"of {MTP} {len(lacking)} tensors are not stored, the first is {lacking[0]!r}",
                str(self.checkpoint.location),
                "fetch the weights again, or leave these layers out: --mtp drop",
            )

    def _check_shape(self, source: str, shape: tuple[int, ...]) -> None:
        stored = self.checkpoint.tensors[source]
        if stored.shape != shape:
            raise ConvertError(
                f"{source!r} has the shape {list(stored.shape)}, the configuration says {list(shape)}",
                str(stored.file),
                "fetch config.json and the weights again, from the same revision",
            )
