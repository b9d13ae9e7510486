"""Which matrices of a model can have their inputs divided by channel, because a tensor before them makes up for it.

The architecture's data file says what feeds what ([feeds]); it is exact for

    a norm                     -> the matrices that its output alone goes into, a router among them
    the values of attention    -> the output projection: attention averages each channel of the values by itself; one
                                  factor for a channel of a key-value head, shared by the query heads of its group
    the up projection          -> the down projection of the same (expert's) gated MLP
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from bitwright.converter.model.configuration import Configuration, configure
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.vocabulary import UNQUANTIZED_ROLES, ModelMap, Role, TensorSpec


@dataclass(frozen=True)
class Consumer:
    """A checkpoint's tensor, the statistics of its inputs (GGUF tensor and index of the matrix), and whether it may be
    quantized: a router is not."""

    tensor: str
    statistics: tuple[str, int]
    quantized: bool


@dataclass(frozen=True)
class Link:
    """A producer and the consumers of its output: names of the checkpoint's tensors.

    rows: the first row of the producer that they are fed from, and the one after the last; of a norm, of its values.
    plus_one: a norm that is stored as its deviation from one. head, repeat: each run of `head` channels is
    `repeat` runs of the consumers' inputs, one after the other.
    """

    producer: str
    bias: str | None
    rows: tuple[int, int]
    consumers: tuple[Consumer, ...]
    plus_one: bool = False
    head: int = 1
    repeat: int = 1

    def spread(self, channels: np.ndarray) -> np.ndarray:
        """From the producer's channels to the consumers' columns."""
        return channels if self.repeat == 1 else channels.reshape(-1, self.head).repeat(self.repeat, axis=0).reshape(-1)

    def gather(self, columns: np.ndarray) -> np.ndarray:
        """The largest value of all columns that a channel goes to."""
        return columns if self.repeat == 1 else columns.reshape(-1, self.repeat, self.head).max(axis=1).reshape(-1)


@dataclass(frozen=True)
class SmoothingGroup:
    """Links that share an alpha: one, or one for every expert of a layer. name: of the producer, as the architecture
    has it. is_norm: what the producer is."""

    name: str
    layer: int
    is_norm: bool
    links: tuple[Link, ...]


def smoothing_groups(checkpoint: Checkpoint, model_map: ModelMap) -> list[SmoothingGroup]:
    """In the order of the layers; in a layer those first whose producers are matrices, as dividing their rows changes
    the columns' maxima of the other groups."""
    configuration = configure(checkpoint.config, str(checkpoint.location / "config.json"), checkpoint.tensors)
    names = _Names(checkpoint, configuration, model_map)
    groups = [
        names.group(layer, producer, fed)
        for layer in range(model_map.n_layers)
        for producer, consumers in configuration.architecture.feeds.items()
        if names.in_layer(layer, [producer]) and (fed := names.in_layer(layer, consumers))
    ]
    return sorted(groups, key=lambda group: (group.layer, group.is_norm))


def unsmoothed(groups: list[SmoothingGroup], model_map: ModelMap) -> list[str]:
    """The GGUF tensors of the layers whose inputs nothing makes up for."""
    fed = {consumer.statistics[0] for group in groups for link in group.links for consumer in link.consumers}
    return [t.name for t in model_map.tensors if t.quantizable and t.layer is not None and t.name not in fed]


class _Names:
    """Finds the checkpoint's tensors by their names in the architecture's data file."""

    def __init__(self, checkpoint: Checkpoint, configuration: Configuration, model_map: ModelMap):
        self.checkpoint, self.configuration = checkpoint, configuration
        architecture = configuration.architecture
        canonical = {architecture.canonical_name(name): name for name in checkpoint.tensors}
        self.stored = {name: stored for name, stored in canonical.items() if name is not None}
        self.specs = {
            source: (spec, matrix) for spec in model_map.tensors for matrix, source in enumerate(spec.sources)
        }

    def in_layer(self, layer: int, patterns: Iterable[str]) -> tuple[str, ...]:
        """Those that a layer of its kind has."""
        return tuple(pattern for pattern in patterns if pattern.format(layer=layer, expert=0) in self.stored)

    def group(self, layer: int, producer: str, consumers: tuple[str, ...]) -> SmoothingGroup:
        of_experts = "{expert}" in producer
        n_links = self.configuration.dimensions["experts"] if of_experts else 1
        links = tuple(self._link(layer, producer, consumers, expert) for expert in range(n_links))
        spec, _ = self._spec(links[0].producer)
        return SmoothingGroup(producer.format(layer=layer, expert="*"), layer, spec.role is Role.NORM, links)

    def _link(self, layer: int, producer: str, consumers: tuple[str, ...], expert: int) -> Link:
        stored = self._stored(producer.format(layer=layer, expert=expert))
        spec, _ = self._spec(stored)
        fed = tuple(c for pattern in consumers for c in self._consumers(layer, producer, pattern, expert))
        first, n_rows = self._rows(spec)
        bias = self.stored.get(f"{producer.format(layer=layer, expert=expert).removesuffix('.weight')}.bias")
        head = self.configuration.dimensions.get("head", 1)
        n_columns = self.checkpoint.tensors[fed[0].tensor].n_columns
        repeat = n_columns // n_rows
        if repeat * n_rows != n_columns or (repeat > 1 and n_rows % head):
            raise ConvertError(
                f"{n_rows} channels of {stored!r} do not make the {n_columns} columns of {fed[0].tensor!r}",
                str(self.checkpoint.location),
                "correct [feeds] in the architecture's data file; see docs/add-an-architecture.md",
            )
        return Link(stored, bias, (first, first + n_rows), fed, spec.layout.values == "plus_one", head, repeat)

    def _rows(self, spec: TensorSpec) -> tuple[int, int]:
        """(first, how many) of one matrix of the producer."""
        dims = self.configuration.dimensions
        if spec.role is Role.ATTENTION_QKV:
            return dims["query"] + dims["key_value"], dims["key_value"]
        if spec.role is Role.MLP_GATE_UP:  # the gate's rows first
            return dims["mlp"], dims["mlp"]
        return 0, spec.n_columns if spec.role is Role.NORM else spec.n_rows // spec.n_matrices

    def _consumers(self, layer: int, producer: str, pattern: str, expert: int) -> Iterator[Consumer]:
        every = "{expert}" in pattern and "{expert}" not in producer
        for index in range(self.configuration.dimensions["experts"]) if every else [expert]:
            stored = self._stored(pattern.format(layer=layer, expert=index))
            spec, matrix = self._spec(stored)
            yield Consumer(stored, (spec.name, matrix), spec.role not in UNQUANTIZED_ROLES)

    def _stored(self, name: str) -> str:
        if name not in self.stored:
            raise ConvertError(
                f"the checkpoint lacks the tensor {name!r}", str(self.checkpoint.location), "fetch it again"
            )
        return self.stored[name]

    def _spec(self, stored: str) -> tuple[TensorSpec, int]:
        return self.specs[stored]
