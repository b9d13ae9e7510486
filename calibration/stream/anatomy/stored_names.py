"""Where the parameters of transformers' model are stored: by transformers' own mapping of names.

Its weight conversions say which names of a checkpoint become which parameter, and how: a plain renaming, the experts of
a layer stacked, gate and up one after the other, the two dimensions of every expert exchanged. Two things are ours: the
prefixes by which a text model is stored inside of a larger one, or without its head, and the single experts that
converter's Checkpoint makes of a tensor that holds all of them.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bitwright.formats.errors import ConvertError
from bitwright.formats.schemes.expert_names import STACKED

WRAPPERS = (
    "model.language_model.model.",
    "language_model.model.",
    "model.language_model.",
    "language_model.",
    "model.text_model.",
    "text_model.",
)
"""Beginnings of the names of a text model inside of a larger one, as different versions of transformers write them; the
longest first."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class StoredMatrices:
    """How a parameter is stored. names: for every matrix of it the stored tensors whose rows make it up, in order; one
    entry where one tensor holds all of them. exchanged: the last two dimensions may be stored the other way round."""

    names: tuple[tuple[str, ...], ...]
    exchanged: bool = False


@dataclass(frozen=True)
class _Part:
    """A stored tensor's place in a parameter: what it stands at among the matrices, and among the blocks of rows of
    one."""

    matrix: int
    block: int
    name: str
    exchanged: bool = False


def locate_parameters(model: Any, wrapper: Any, stored: Collection[str]) -> dict[str, StoredMatrices]:
    """Parameter -> how it is stored, for those of which the checkpoint has something.

    model: transformers', with or without weights. wrapper: the configuration of the whole model that the text model
    `model` is part of, or its own. Names that belong to no parameter (an image encoder's) are left out.
    Raises ConvertError for a conversion of transformers' that is none of those above.
    """
    names = _Names(model, wrapper)
    parts: dict[str, dict[tuple[int, int], _Part]] = {}
    for name in sorted(stored, key=_natural):
        if (place := names.place(name)) is not None:
            parameter, part = place
            parts.setdefault(parameter, {}).setdefault((part.matrix, part.block), part)
    return {parameter: _in_order(of.values()) for parameter, of in parts.items()}


def _in_order(parts: Iterable[_Part]) -> StoredMatrices:
    matrices: dict[int, list[_Part]] = {}
    for part in sorted(parts, key=lambda part: (part.matrix, part.block)):
        matrices.setdefault(part.matrix, []).append(part)
    first = next(iter(matrices.values()))[0]
    return StoredMatrices(tuple(tuple(part.name for part in of) for of in matrices.values()), first.exchanged)


class _Names:
    """What names of a checkpoint stand for in a model."""

    def __init__(self, model: Any, wrapper: Any):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model, self.shapes = model, model.state_dict()
        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        if wrapper.model_type != model.config.model_type:
            own: Any = get_checkpoint_conversion_mapping(wrapper.model_type)  # type: ignore[no-untyped-call]
            self.converters += [t for t in own or [] if isinstance(t, WeightConverter)]
        body = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
        self.body = body or next((name for name, child in model.named_children() if _is_model(child)), "")

    def place(self, name: str) -> tuple[str, _Part] | None:
        """What a stored name stands for in the model; None for nothing."""
        from transformers.core_model_loading import rename_source_key

        for candidate in self._beginnings(name):
            renamed, pattern = rename_source_key(
                candidate, self.renamings, self.converters, self.model.base_model_prefix, self.shapes
            )
            if renamed in self.shapes:
                return renamed, _Part(0, 0, name) if pattern is None else self._converted(name, pattern)
            if expert := _EXPERT.fullmatch(renamed if pattern is None else candidate):
                for stacked, parts in STACKED.items():
                    if expert[3] in parts and f"{expert[1]}.{stacked}" in self.shapes:
                        return f"{expert[1]}.{stacked}", _Part(int(expert[2]), parts.index(expert[3]), name)
            if candidate in self.shapes:  # a renaming meant for another checkpoint's names may have led it away
                return candidate, _Part(0, 0, name)
        return None

    def _beginnings(self, name: str) -> Iterator[str]:
        yield name
        for prefix in WRAPPERS:
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                yield rest
                if self.body:
                    yield f"{self.body}.{rest}"
        if self.body and not name.startswith(f"{self.body}."):
            yield f"{self.body}.{name}"

    def _converted(self, name: str, pattern: str) -> _Part:
        from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

        converter = next(c for c in self.converters if pattern in c.source_patterns)
        block = converter.source_patterns.index(pattern)
        operations: list[Any] = converter.operations
        if len(converter.target_patterns) == 1:
            if [type(o) for o in operations] == [Transpose] and operations[0].check_dims:
                return _Part(0, 0, name, exchanged=True)
            merged = [o for o in operations if isinstance(o, MergeModulelist)]
            joined = [o for o in operations if isinstance(o, Concatenate)]
            # Of experts that are stacked the rows are dimension 1, of a single matrix dimension 0.
            if len(merged) + len(joined) == len(operations) and all(o.dim == len(merged) for o in joined):
                number = _number(pattern, name) if "*" in pattern else 0
                return _Part(number, block, name) if merged else _Part(0, block + number, name)
        raise ConvertError(
            f"{self.model.config.model_type!r} stores a tensor in a way that calibration does not read",
            name,
            "give an importance matrix with --imatrix, or convert to 8 bits and more",
        )


def _number(pattern: str, name: str) -> int:
    """What the star of transformers' pattern stands for in a name that it matches."""
    found = re.search(pattern.replace("*", r"(\d+)"), name)
    return int(found[1] if found else re.findall(r"\d+", name)[-1])


def _is_model(module: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Experts by their number, not by its digits."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
