"""Super weights: single weights of MLP down projections on which the whole model depends, and what was found of them.

A super weight writes one huge activation into the residual stream: its input column and its output row spike together
(Yu et al., "The Super Weight in Large Language Models", 2024). super_weight_search looks for such pairs, and keeps
those whose removal, alone or with others, really costs: a model may have none, and then the report says what was
looked at.
Coordinates are those of the checkpoint's matrix and, down projections being stored as they are, of the artifact's.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_type_hints

from bitwright.formats.errors import ConvertError
from bitwright.formats.typed import is_a

Criterion = Literal["spikes", "gradients"]
VERSION = 1
T = TypeVar("T")


class Place(NamedTuple):
    """A weight of a down projection. tensor: GGUF name; matrix: the expert, 0 in a dense model."""

    layer: int
    tensor: str
    matrix: int
    row: int
    column: int


@dataclass(frozen=True)
class SuperWeight:
    """A weight that was set to zero to see what it is worth.

    matrix: the expert, 0 in a dense model. value: the weight. found_by: what made it a candidate.
    loss_when_removed, divergence_when_removed: with this weight alone at zero, the increase of the mean cross-entropy
    of the text, and the mean KL divergence from the model as it is, in nats per token.
    row_ratio, column_ratio: largest output of its row and largest input of its column, over the median of those of all
    rows and columns of the matrix; share: its own largest contribution over its row's largest output.
    """

    layer: int
    tensor: str
    matrix: int
    row: int
    column: int
    value: float
    loss_when_removed: float
    divergence_when_removed: float
    row_ratio: float
    column_ratio: float
    share: float
    found_by: Criterion

    @property
    def place(self) -> Place:
        return Place(self.layer, self.tensor, self.matrix, self.row, self.column)


@dataclass(frozen=True)
class JointSet:
    """Weights that were set to zero together; loss and divergence as of SuperWeight.

    why: what they share. confirmed: none of them can be left out, and together they are worth more than any alone.
    """

    members: tuple[Place, ...]
    why: str
    loss_when_removed: float
    divergence_when_removed: float
    confirmed: bool


@dataclass(frozen=True)
class LargestSpike:
    """The largest output of a down projection beside its median row's, and the largest input beside its column's.

    share: the largest contribution that the weight at row and column makes, over the row's largest output.
    """

    layer: int
    tensor: str
    matrix: int
    row: int
    row_ratio: float
    column: int
    column_ratio: float
    share: float


@dataclass(frozen=True)
class SuperWeightReport:
    """What was found, what was tried in vain, and what was looked at.

    weights: confirmed, the one whose removal costs most first. rejected: candidates whose removal costs little.
    untried: candidates beyond those that were tried, which were the strongest.
    largest_spikes: one a layer, of the model as it is. spike_ratio: from which ratio on a peak is a spike;
    least_divergence: from which divergence on a candidate is confirmed. looks: how often the model was looked at, each
    time with all candidates at zero that had been found before. prompts: sequences looked at, of prompt_length tokens.
    perplexity: of the text on which removals were measured, samples of sequence_length tokens of the corpus; None when
    there was nothing to remove.
    model, revision: the source model.
    """

    weights: tuple[SuperWeight, ...]
    rejected: tuple[SuperWeight, ...]
    joint_sets: tuple[JointSet, ...]
    untried: int
    largest_spikes: tuple[LargestSpike, ...]
    criteria: tuple[Criterion, ...]
    spike_ratio: float
    least_divergence: float
    looks: int
    prompts: int
    prompt_length: int
    perplexity: float | None
    corpus: str
    corpus_sha256: str
    samples: int
    sequence_length: int
    model: str | None = None
    revision: str | None = None
    where: str = field(default="super weights", repr=False, compare=False)

    def to_json(self) -> str:
        """One line; the same report gives the same text."""
        data = asdict(self)
        del data["where"]
        data["joint_sets"] = [{**asdict(s), "members": [m._asdict() for m in s.members]} for s in self.joint_sets]
        return json.dumps({"version": VERSION, **data}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str) -> "SuperWeightReport":
        """Raises ConvertError for a text that to_json has not written, and for impossible values."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _damaged(where, f"it is no JSON ({error})") from None
        if not isinstance(data, dict) or data.pop("version", None) != VERSION:
            raise _damaged(where, f"it is not of version {VERSION}")
        parts: dict[str, tuple[Any, ...]] = {
            "weights": _records(data, "weights", SuperWeight, where),
            "rejected": _records(data, "rejected", SuperWeight, where),
            "largest_spikes": _records(data, "largest_spikes", LargestSpike, where),
        }
        sets = data.get("joint_sets")
        if not isinstance(sets, list) or not all(isinstance(s, dict) for s in sets):
            raise _damaged(where, "joint_sets is no list of records")
        parts["joint_sets"] = tuple(
            _record({**s, "members": _records(s, "members", Place, where)}, JointSet, where) for s in sets
        )
        criteria = data.get("criteria")
        if not isinstance(criteria, list) or not all(criterion in get_args(Criterion) for criterion in criteria):
            raise _damaged(where, f"criteria is {criteria!r}")
        return _record({**data, **parts, "criteria": tuple(criteria), "where": where}, cls, where)


def _records(data: Mapping[str, Any], key: str, kind: type[T], where: str) -> tuple[T, ...]:
    values = data.get(key)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise _damaged(where, f"{key} is no list of records")
    return tuple(_record(value, kind, where) for value in values)


def _record(data: Mapping[str, Any], kind: type[T], where: str) -> T:
    """The dataclass or named tuple of these values, each of the type that its field is declared with."""
    declared = get_type_hints(kind)
    if odd := (data.keys() ^ declared.keys()) - {"where"}:
        raise _damaged(where, f"{min(odd)} is absent or unknown")
    for name, value in data.items():
        if not is_a(value, declared[name]) or (type(value) is int and value < 0):
            raise _damaged(where, f"{name} is {value!r}")
    return kind(**data)


def _damaged(where: str, problem: str) -> ConvertError:
    return ConvertError(
        f"the record of super weights is damaged: {problem}",
        where,
        "look for them again: bitwright imatrix --super-weights MODEL",
    )
