"""The stage `describe`: from a Checkpoint to a ModelMap, and the rows of its tensors as the artifact stores them."""

from collections.abc import Iterator

import numpy as np

from converter import gguf_source
from converter.architecture import TensorRule, gguf_name, gguf_name_map, with_scales_applied
from converter.checkpoint import Checkpoint
from converter.configuration import Configuration, configure
from converter.known_cases import explain_names
from converter.metadata import model_metadata
from converter.rescaling import rescale_rows
from converter.rope import rope_factors
from converter.source_config import check_unquantized
from converter.stored_tensors import by_name
from converter.tokenizer import tokenizer_metadata
from formats.errors import ConvertError
from profiles.vocabulary import ModelMap, Role, TensorSpec


def describe(checkpoint: Checkpoint, pre_tokenizer: str | None = None) -> ModelMap:
    """What the checkpoint is made of, in the order of the artifact: embedding, layers, output.

    pre_tokenizer: llama.cpp's name of the pre-tokenizer, for a tokenizer that cannot be recognised.
    Raises ConvertError for an unknown architecture or tensor, a tensor that is absent or has another shape than the
    configuration says, quantized weights, and a configuration that llama.cpp does not implement.
    """
    if checkpoint.metadata is not None:
        return gguf_source.describe_gguf(checkpoint)
    configuration = configure(checkpoint.config, str(checkpoint.location / "config.json"), checkpoint.tensors)
    describer = _Describer(checkpoint, configuration)
    notes = [*checkpoint.notes, *describer.check()]
    tensors = with_scales_applied([configuration.architecture], describer.tensors())
    metadata, about_card = model_metadata(checkpoint, configuration, tensors)
    tokenizer = tokenizer_metadata(checkpoint.location, configuration.dimensions["vocab"], pre_tokenizer)
    return ModelMap(
        configuration.architecture.gguf_name,
        configuration.dimensions["layers"],
        tensors,
        metadata | tokenizer.values,
        source_notes=(*notes, *about_card),
        gguf_notes=configuration.notes + tokenizer.notes,
    )


def read_rows(checkpoint: Checkpoint, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    """Rows start to stop of the tensor as the artifact stores it, counted over all its matrices: float32
    [stop - start, n_columns], C-contiguous. A vector is one row. The cost is that of the rows asked for."""
    return rescale_rows(spec, _read_unscaled(checkpoint, spec, start, stop), start)


def _read_unscaled(checkpoint: Checkpoint, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
    if spec.transform == "constant":
        return np.array([spec.constant], np.float32)[start:stop]
    if len(spec.sources) == 1:
        return _read_transformed(checkpoint, spec, spec.sources[0], start, stop)
    rows_per_matrix = spec.n_rows // spec.n_matrices
    parts = []
    for matrix in range(start // rows_per_matrix, -(-stop // rows_per_matrix)):
        first = matrix * rows_per_matrix
        part = max(start - first, 0), min(stop - first, rows_per_matrix)
        parts.append(_read_transformed(checkpoint, spec, spec.sources[matrix], *part))
    return np.concatenate(parts) if parts else np.empty((0, spec.n_columns), np.float32)


def row_spans(spec: TensorSpec, n_weights: int) -> Iterator[tuple[int, int, int]]:
    """(matrix, first row, end row) of spans that stay within one matrix and within so many weights, in order."""
    rows_per_matrix = spec.n_rows // spec.n_matrices
    step = max(1, n_weights // spec.n_columns)
    for matrix in range(spec.n_matrices):
        end = (matrix + 1) * rows_per_matrix
        for start in range(matrix * rows_per_matrix, end, step):
            yield matrix, start, min(start + step, end)


def artifact_order(spec: TensorSpec, values: np.ndarray) -> np.ndarray:
    """What belongs to the rows of the checkpoint's tensor, one value each over all matrices, as `read_rows` orders
    them: [n_rows]."""
    if spec.transform == "rotary":
        return values.reshape(spec.n_heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return values.reshape(-1)


def restore(spec: TensorSpec, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse of `read_rows` over a whole tensor: rows float32 [n_rows, n_columns] of the artifact to the
    checkpoint's tensors, by name and in their own shapes. What is rescaled stays so: tensors that make up for each
    other compute the same function."""
    if spec.transform == "constant":
        return {}
    if spec.transform == "plus_one":
        rows = rows - np.float32(1)
    if spec.transform == "rotary":
        rows = rows.reshape(spec.n_heads, -1, 2, 1 if len(spec.shape) == 1 else spec.n_columns).swapaxes(1, 2)
    if len(spec.sources) == 1:
        return {spec.sources[0]: rows.reshape(spec.shape)}
    return dict(zip(spec.sources, rows.reshape(spec.shape), strict=True))


def _read_transformed(checkpoint: Checkpoint, spec: TensorSpec, source: str, start: int, stop: int) -> np.ndarray:
    """Rows start to stop of one matrix."""
    if spec.transform == "rotary":
        return _read_rotary(checkpoint, spec, source, start, stop)
    rows = checkpoint.read(source, start, stop).reshape(stop - start, spec.n_columns)
    return rows + np.float32(1) if spec.transform == "plus_one" else rows


def _read_rotary(checkpoint: Checkpoint, spec: TensorSpec, source: str, start: int, stop: int) -> np.ndarray:
    """transformers turns row i of a head together with row i + half; llama.cpp's llama turns neighbours: so the two
    halves of every head are interleaved. Whole heads are read, and the rows asked for are cut out."""
    if len(spec.shape) == 1:
        values = checkpoint.read(source).reshape(spec.n_heads, 2, -1)
        return values.swapaxes(1, 2).reshape(1, spec.n_columns)[start:stop]
    head_rows = spec.n_rows // spec.n_heads
    first, last = start // head_rows * head_rows, -(-stop // head_rows) * head_rows
    halves = checkpoint.read(source, first, last).reshape(-1, 2, head_rows // 2, spec.n_columns)
    interleaved = halves.swapaxes(1, 2).reshape(last - first, spec.n_columns)
    return np.ascontiguousarray(interleaved[start - first : stop - first])


class _Describer:
    """Matches the checkpoint's tensors with the architecture's rules."""

    def __init__(self, checkpoint: Checkpoint, configuration: Configuration):
        self.checkpoint, self.configuration = checkpoint, configuration
        self.architecture, self.dims = configuration.architecture, configuration.dimensions
        self.names = gguf_name_map(self.architecture.gguf_name, self.dims["layers"])
        self.stored = by_name(self.architecture.canonical_name, checkpoint.tensors, str(checkpoint.location))

    def check(self) -> list[str]:
        """Compares what is stored with what the configuration asks for, once; returns what to note.

        Raises ConvertError for weights that are quantized, and for tensors that are not stored or belong to no place.
        """
        expected = {name for rule, layer in self._rules() for name in self._wanted(rule, layer)}
        used = {own: self.checkpoint.tensors[own] for name, own in self.stored.items() if name in expected}
        notes = check_unquantized(self.checkpoint.config, used, self.configuration.where)
        missing, unknown = expected - self.stored.keys(), self.stored.keys() - expected
        if unknown:
            self._refuse_switched_off()
        if missing or unknown:
            model = self.checkpoint.model_id if self.checkpoint.fetch_weights else str(self.checkpoint.location)
            raise explain_names(missing, unknown, self.stored, self.dims["layers"], self.architecture.name, model)
        return notes

    def tensors(self) -> Iterator[TensorSpec]:
        for rule, layer in self._rules():
            yield self._spec(rule, layer)
            if rule is self.architecture.before[-1]:
                for name, factors in rope_factors(self.configuration.rope, self.dims["rotary"]).items():
                    yield TensorSpec(name, (len(factors),), Role.ROPE, transform="constant", constant=factors)

    def _rules(self) -> Iterator[tuple[TensorRule, int | None]]:
        """The rules of the tensors that this model has, with their layers, in the order of the artifact."""
        for rule in self.architecture.before:
            yield rule, None
        for layer in range(self.dims["layers"]):
            for rule in self.architecture.layer:
                if not rule.when or self.configuration.values.get(rule.when):
                    yield rule, layer
        for rule in self.architecture.after:
            tied = rule.role is Role.OUTPUT and self.configuration.values["tie_word_embeddings"]
            # Where a tied head is stored all the same, it is one of its own: see stored_tensors.
            if not tied or rule.pattern in self.stored:
                yield rule, None

    def _wanted(self, rule: TensorRule, layer: int | None) -> list[str]:
        n_experts = self.dims["experts"] if rule.stacked else 1
        return [rule.pattern.format(layer=layer, expert=expert) for expert in range(n_experts)]

    def _spec(self, rule: TensorRule, layer: int | None) -> TensorSpec:
        matrix_shape = tuple(self.dims[name] for name in rule.shape)
        sources = tuple(self.stored[name] for name in self._wanted(rule, layer))
        for source in sources:
            self._check_shape(source, matrix_shape)
        return TensorSpec(
            name=gguf_name(self.names, rule.pattern.replace(".{expert}", "").format(layer=layer)),
            shape=(len(sources), *matrix_shape) if rule.stacked else matrix_shape,
            role=rule.role,
            layer=layer,
            sources=sources,
            transform="rotary" if rule.rotary else rule.transform,
            n_heads=self.dims[rule.rotary] if rule.rotary else 0,
        )

    def _refuse_switched_off(self) -> None:
        """Raises ConvertError for a tensor that is stored, and that the configuration says the model does without."""
        values = self.configuration.values
        for rule in self.architecture.layer:
            name = rule.pattern.format(layer=0, expert=0)
            if rule.when and not values.get(rule.when) and name in self.stored:
                raise ConvertError(
                    f"the checkpoint has {name!r}, and the configuration has {rule.when} = {values.get(rule.when)!r}:"
                    " transformers computes without it",
                    f"{self.configuration.where}: {rule.when}",
                    f"set {rule.when} to true if the model was trained with it, or take these tensors out",
                )

    def _check_shape(self, source: str, shape: tuple[int, ...]) -> None:
        stored = self.checkpoint.tensors[source]
        if stored.shape != shape:
            raise ConvertError(
                f"{source!r} has the shape {list(stored.shape)}, the configuration says {list(shape)}",
                str(stored.file),
                "fetch config.json and the weights again, from the same revision",
            )
