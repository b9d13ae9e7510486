"""The pass that looks at what goes into the matrices of a model, and into its caches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from bitwright.calibration.control import PassControl
from bitwright.calibration.passes.activation_observer import CACHED, InputObserver, Rows
from bitwright.calibration.passes.input_sums import EXACT, combine, smoothed
from bitwright.calibration.places import MatrixNames
from bitwright.calibration.statistics.activations import (
    DECAY,
    ActivationStatistics,
    CachedPeaks,
    InputRows,
    MatrixInputs,
)
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.micro_batches import Excerpt
from bitwright.calibration.stream.observer import Sums, add_sums
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.stream.weights import ParameterReader
from bitwright.calibration.text.corpus import Corpus

_CACHES = tuple(f"cached {kind}" for kind in CACHED)


@dataclass(frozen=True, eq=False)
class ActivationSums:
    """The statistics of an excerpt of a text, to be merged with those of the others.

    groups: group -> "squares", "totals" -> GGUF tensor -> that field of MatrixInputs. inputs: of all its groups, other
    fields by tensor, minima and maxima infinite where no row has come; "ends", what ranges are made of, float32
    [n_matrices, n_batches, 2]; and "cached keys", "cached values" by layer, see CachedPeaks.
    """

    groups: Mapping[int, Mapping[str, Mapping[str, np.ndarray]]]
    inputs: Mapping[str, Mapping[str, np.ndarray]]


def stream_activations(
    streamable: StreamableModel,
    names: MatrixNames,
    corpus: Corpus,
    control: PassControl,
    *,
    decay: float = DECAY,
    rows: InputRows | None = None,
    stage: str = "calibrate",
) -> ActivationStatistics:
    """Run the model over the corpus layer by layer and look at the inputs of its matrices and of its caches.

    names, control: as of stream_importance. rows: where to keep some rows of every input, as many as
    `activation_observer.KEPT_ROWS`. stage: what the progress calls it.
    """
    observer = InputObserver(decay, excerpt=Excerpt.whole(len(corpus.tokens)))
    parameters = _stream(observer, streamable, names, corpus, control, rows, stage)
    identity = {"model": streamable.name, "revision": streamable.revision, **corpus.identity}
    inputs = _by_tensor(observer.inputs, parameters, names) | _caches(observer)
    return _statistics(inputs, decay, transform=streamable.variant, **identity)


def stream_activation_sums(
    streamable: StreamableModel,
    names: MatrixNames,
    corpus: Corpus,
    control: PassControl,
    excerpt: Excerpt,
    rows: InputRows,
) -> ActivationSums:
    """The same of an excerpt of the corpus alone, for `merged_activations`."""
    observer = InputObserver(DECAY, excerpt=excerpt, apart=True)
    parameters = _stream(observer, streamable, names, corpus, control, rows, "calibrate")
    exact = {key: {name: getattr(sums, key) for name, sums in observer.sums.items()} for key in EXACT}
    ends = {name: np.ascontiguousarray(of.swapaxes(0, 1)) for name, of in observer.ends.items()}
    groups = {group: _by_tensor(sums, parameters, names) for group, sums in observer.grouped.groups.items()}
    return ActivationSums(groups, _by_tensor(exact | {"ends": ends}, parameters, names) | _caches(observer))


def merged_activations(parts: Sequence[ActivationSums], **identity: Any) -> ActivationStatistics:
    """What `stream_activations` gives for a corpus that these are all excerpts of, in their order; they are not used
    again. identity: of model and corpus, as ActivationStatistics has it."""
    groups = {group: of for part in parts for group, of in part.groups.items()}
    total: dict[str, dict[str, np.ndarray]] = {"squares": {}, "totals": {}}
    for group in sorted(groups):
        add_sums(total, groups[group])
    inputs: dict[str, dict[str, np.ndarray]] = {}
    for part in parts:
        for key, of_part in part.inputs.items():
            into = inputs.setdefault(key, {})
            for name, values in of_part.items():
                if name not in into:
                    into[name] = values
                elif key == "ends":
                    into[name] = np.concatenate([into[name], values], axis=1)
                else:
                    combine("maxima" if key in _CACHES else key, into[name], values)
    ends = inputs.pop("ends", {})
    ranges = {name: smoothed(of.swapaxes(0, 1), DECAY) for name, of in ends.items()}
    return _statistics(inputs | total | {"ranges": ranges}, DECAY, **identity)


def _stream(
    observer: InputObserver,
    streamable: StreamableModel,
    names: MatrixNames,
    corpus: Corpus,
    control: PassControl,
    rows: InputRows | None,
    stage: str,
) -> ParameterReader:
    """Show the observer its excerpt of the corpus; returns what finds the stored tensors of its parameters."""
    excerpt = observer.grouped.excerpt
    assert excerpt is not None
    tokens = corpus.tokens[excerpt.first : excerpt.first + excerpt.n_samples]
    settings = {"decay": observer.decay, "rows": rows is not None}
    stream = LayerStream(streamable, tokens, control, observer=observer, settings=settings, excerpt=excerpt)
    if rows is not None:
        observer.write_rows = partial(_write_rows, rows, stream.parameters, names)
    stream.run(stage)
    stream.discard_hidden_states()
    return stream.parameters


def _write_rows(rows: InputRows, parameters: ParameterReader, names: MatrixNames, taken: Rows) -> None:
    for parameter, of_matrices in taken.items():
        stored = parameters.matrices(parameter)
        places = {place.tensor: place for name in stored[0] for place in names.get(name, ())}
        for tensor, place in sorted(places.items())[:1]:
            columns = slice(None) if place.columns is None else place.columns
            rows.write(tensor, {i: of_matrix[:, columns] for i, of_matrix in of_matrices.items()})


def _by_tensor(
    of_parameters: Sums, parameters: ParameterReader, names: MatrixNames
) -> dict[str, dict[str, np.ndarray]]:
    """Kind -> GGUF tensor -> what is known of its matrices, one after the other, out of the same by parameter."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for kind, of_kind in of_parameters.items():
        parts: dict[str, dict[int, np.ndarray]] = {}
        for parameter, values in of_kind.items():
            for place, span, _ in parameters.places(parameter, len(values), names):
                taken = place.of_columns if kind in ("minima", "maxima", "squares") else place.of_matrices
                parts.setdefault(place.tensor, {})[place.matrix] = taken(values[span])
        found[kind] = {tensor: np.concatenate([of[i] for i in sorted(of)]) for tensor, of in sorted(parts.items())}
    return found


def _caches(observer: InputObserver) -> dict[str, dict[str, np.ndarray]]:
    return {
        f"cached {cached}": {str(layer): peaks for (kind, layer), peaks in observer.caches.items() if kind == cached}
        for cached in CACHED
    }


def _statistics(kinds: Mapping[str, Mapping[str, np.ndarray]], decay: float, **identity: Any) -> ActivationStatistics:
    """kinds: as of ActivationSums.inputs, with all fields of MatrixInputs; ranges as of `smoothed`."""
    inputs = {}
    for tensor, counts in sorted(kinds["counts"].items()):
        of_tensor = {field.name: kinds[field.name][tensor] for field in fields(MatrixInputs)}
        for key in ("minima", "maxima"):
            of_tensor[key][counts == 0] = 0
        of_tensor["ranges"] = np.nan_to_num(of_tensor["ranges"], nan=0.0)
        inputs[tensor] = MatrixInputs(**of_tensor)
    keys, values = (kinds[cached] for cached in _CACHES)
    caches = {layer: CachedPeaks(keys[str(layer)], values[str(layer)]) for layer in sorted(map(int, keys))}
    return ActivationStatistics(inputs=inputs, decay=decay, caches=caches, **identity)
