"""The pass that looks at what goes into the matrices of a model, and into its caches."""

from functools import partial

import numpy as np

from bitwright.calibration.control import PassControl
from bitwright.calibration.passes.activation_observer import FIELDS, InputObserver, InputSums, Rows
from bitwright.calibration.places import MatrixNames, Place
from bitwright.calibration.statistics.activations import (
    DECAY,
    ActivationStatistics,
    CachedPeaks,
    InputRows,
    MatrixInputs,
)
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.stream.weights import ParameterReader
from bitwright.calibration.text.corpus import Corpus


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
    observer = InputObserver(decay)
    settings = {"decay": decay, "rows": rows is not None}
    stream = LayerStream(streamable, corpus.tokens, control, observer=observer, settings=settings)
    if rows is not None:
        observer.write_rows = partial(_write_rows, rows, stream.parameters, names)
    stream.run(stage)
    stream.discard_hidden_states()
    parts: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for parameter, sums in observer.inputs.items():
        for place, span, _ in stream.parameters.places(parameter, len(sums.counts), names):
            parts.setdefault(place.tensor, {})[place.matrix] = _of_place(place, sums, span)
    return ActivationStatistics(
        inputs={tensor: _joined([of[i] for i in sorted(of)]) for tensor, of in sorted(parts.items())},
        model=streamable.name,
        revision=streamable.revision,
        **corpus.identity,
        transform=streamable.variant,
        decay=decay,
        caches={
            layer: CachedPeaks(peaks, observer.caches["values", layer])
            for (kind, layer), peaks in sorted(observer.caches.items())
            if kind == "keys"
        },
    )


def _write_rows(rows: InputRows, parameters: ParameterReader, names: MatrixNames, taken: Rows) -> None:
    for parameter, of_matrices in taken.items():
        stored = parameters.matrices(parameter)
        places = {place.tensor: place for name in stored[0] for place in names.get(name, ())}
        for tensor, place in sorted(places.items())[:1]:
            columns = slice(None) if place.columns is None else place.columns
            rows.write(tensor, {i: of_matrix[:, columns] for i, of_matrix in of_matrices.items()})


def _of_place(place: Place, sums: InputSums, span: slice) -> dict[str, np.ndarray]:
    by_column = ("minima", "maxima", "squares")
    values = {key: getattr(sums, key)[span] for key in FIELDS}
    return {key: (place.of_columns if key in by_column else place.of_matrices)(of) for key, of in values.items()}


def _joined(parts: list[dict[str, np.ndarray]]) -> MatrixInputs:
    joined = {key: np.concatenate([part[key] for part in parts]) for key in FIELDS}
    unseen = joined["counts"] == 0
    for key in ("minima", "maxima"):
        joined[key] = joined[key].copy()
        joined[key][unseen] = 0
    return MatrixInputs(**joined)
