"""The stage `encode` of a safetensors directory: one module at a time, each on all threads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Self

import numpy as np

from bitwright.calibration.places import MatrixNames, Place
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.artifact.feedback import Feedback, Outcome, judge, output_squares
from bitwright.converter.directory.repacked import repacked
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.registry import get_format
from bitwright.formats.schemes.registry import Scheme
from bitwright.formats.schemes.row_chunks import for_row_chunks
from bitwright.formats.schemes.scheme import Tensors
from bitwright.profiles.planning.plan_modules import ModulePlan, PlannedModule


@dataclass(frozen=True)
class StoredScales:
    """What a directory stores of values that calibration has seen. ranges: tensor -> least and largest value of its
    inputs that are represented, for those whose scheme stores a scale of them. caches: name -> bits uint16 [1] of every
    scale of a cache."""

    ranges: Mapping[str, tuple[float, float]]
    caches: Mapping[str, np.ndarray]


def column_importance(importance: ImportanceMatrix | None, places: Sequence[Place] | None) -> np.ndarray | None:
    """The importance of the columns of a matrix, float32 [n_columns]. places: where it is in a GGUF, whose names the
    importance has."""
    if importance is None or not places or places[0].tensor not in importance.names:
        return None
    columns: np.ndarray = importance.columns(places[0].tensor)[places[0].matrix]
    return places[0].stored_columns(columns).astype(np.float32)


class ModuleEncoder:
    """Encodes the rows of a plan of modules.

    checkpoint: the weights as they are to be encoded. names: the checkpoint's tensor -> its places in a GGUF, by which
    importance goes. feedback: what matrices whose scheme takes it are encoded with; outcomes: what feedback did for
    each matrix. copied: those that the source has stored as they are planned.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: ModulePlan,
        importance: ImportanceMatrix | None,
        names: MatrixNames,
        scales: StoredScales,
        threads: int,
        feedback: Feedback | None = None,
    ):
        self.checkpoint, self.plan, self.threads = checkpoint, plan, threads
        self.importance, self.names, self.scales = importance, names, scales
        self.feedback = feedback
        self.outcomes: dict[str, Outcome] = {}
        self.copied: set[str] = set()
        self._global_scales: dict[tuple[str, ...], float] = {}

    @property
    def rows(self) -> tuple[PlannedModule, ...]:
        return self.plan.tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._global_scales.clear()

    def encode(self, planned: PlannedModule) -> Iterator[np.ndarray]:
        """The data of everything that stands for it in the file, in order, uint8.

        Raises ConvertError for weights that cannot be encoded, naming the tensor, and for inputs that no calibration
        has seen.
        """
        scheme = planned.scheme
        yield from self.data(planned, None if scheme is None else self.tensors(planned, scheme))

    def data(self, planned: PlannedModule, tensors: Tensors | None) -> Iterator[np.ndarray]:
        """As of `encode`, where these tensors are stored of the matrix, by suffix; None for one that is kept."""
        if tensors is None or planned.scheme is None:
            yield from self._kept(planned)
        else:
            for suffix, (dtype, shape) in planned.scheme.tensors(*planned.tensor.shape).items():
                values = tensors[suffix]
                if values.shape != shape:
                    raise ValueError(f"{planned.module}.{suffix} is {values.shape} of {dtype}, not {shape}")
                yield np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        for name in planned.cache_scales:
            yield self.scales.caches[name].view(np.uint8)

    def remarks(self, name: str) -> dict[str, object]:
        """What the journal keeps of a tensor: what feedback did for it."""
        return {"feedback": [asdict(self.outcomes[name])]} if name in self.outcomes else {}

    def was_copied(self, name: str) -> bool:
        """As PlanEncoder.was_copied."""
        return False

    def tensors(self, planned: PlannedModule, scheme: Scheme) -> Tensors:
        """By suffix what is stored of the matrix, with the scale of its input."""
        name = planned.tensor.name
        rows = self.checkpoint.read(name)
        tensors = repacked(self.checkpoint, planned, scheme, rows)
        if tensors is None:
            tensors = self._found(planned, scheme, rows)
        else:
            self.copied.add(name)
        if planned.stored_activations is not None:
            tensors = tensors | scheme.encode_input(*self._input_range(name))
        return tensors

    def _found(self, planned: PlannedModule, scheme: Scheme, rows: np.ndarray) -> Tensors:
        """What the encoder makes of the rows of the matrix, float32 [n_rows, n_columns]."""
        name = planned.tensor.name
        global_scale = self._global_scale(planned, scheme)

        def encoded(columns: np.ndarray | None) -> Tensors:
            return scheme.encode(
                rows, columns, effort=self.plan.effort, global_scale=global_scale, n_threads=self.threads
            )

        try:
            tensors = encoded(self._columns(name))
        except ConvertError as error:
            raise ConvertError(error.what, f"tensor {name}: {error.where}", error.remedy) from None
        if self.feedback is not None and scheme.takes_feedback and name in self.names:
            tensors = self._fed_back(self.feedback, name, scheme, rows, tensors, encoded)
        return tensors

    def _fed_back(
        self,
        feedback: Feedback,
        name: str,
        scheme: Scheme,
        rows: np.ndarray,
        plain: Tensors,
        encoded: Callable[[np.ndarray], Tensors],
    ) -> Tensors:
        """The matrix with feedback, or without where that is better."""
        tensor, matrix = self.names[name][0].tensor, self.names[name][0].matrix
        with ThreadPoolExecutor(self.threads) as pool:
            inputs = feedback.inputs(tensor, matrix, 1, pool.map, feedback.folded(name))
        if isinstance(inputs, Outcome):
            self.outcomes[name] = replace(inputs, tensor=name, matrix=0)
            return plain
        fed = scheme.feed_back(
            encoded(inputs.factor.importance),
            rows,
            inputs.factor,
            feedback.level,
            effort=self.plan.effort,
            n_threads=self.threads,
        )
        decoded = [scheme.decode(tensors, rows.shape) for tensors in (plain, fed)]
        sums: dict[int, np.ndarray] = {}

        def work(chunk: slice) -> None:
            sums[chunk.start] = output_squares(rows[chunk], [values[chunk] for values in decoded], inputs)

        for_row_chunks(rows.shape[0], rows.shape[1], self.threads, work)
        self.outcomes[name] = judge(name, 0, np.sum([sums[start] for start in sorted(sums)], axis=0))
        return fed if self.outcomes[name].kept else plain

    def _kept(self, planned: PlannedModule) -> Iterator[np.ndarray]:
        name = planned.tensor.name
        n_columns = self.checkpoint.tensors[name].n_columns
        encode = get_format(planned.format).encode
        for rows in self.checkpoint.blocks(name):
            yield encode(rows.reshape(-1, n_columns)).reshape(-1)

    def _columns(self, name: str) -> np.ndarray | None:
        return column_importance(self.importance, self.names.get(name))

    def _global_scale(self, planned: PlannedModule, scheme: Scheme) -> float | None:
        """Of several matrices that a runtime multiplies as one; None for the matrix's own."""
        group = planned.shares_scale_with
        if not scheme.has_global_scale or len(group) == 1:
            return None
        if group not in self._global_scales:
            self._global_scales[group] = scheme.shared_scale(
                lambda: map(self.checkpoint.read, group),
                self._columns(group[0]),
                effort=self.plan.effort,
                n_threads=self.threads,
            )
        return self._global_scales[group]

    def _input_range(self, name: str) -> tuple[float, float]:
        low, high = self.scales.ranges.get(name, (0.0, 0.0))
        if not (np.isfinite([low, high]).all() and low <= 0 <= high and low < high):
            raise ConvertError(
                f"its inputs were not seen in calibration, or only zeros ({low:g} to {high:g}), so they have no scale",
                f"tensor {name}",
                f"read more text (--samples 1024), or measure them when it runs: --set '{name}=W8A8' or FP8",
            )
        return low, high
