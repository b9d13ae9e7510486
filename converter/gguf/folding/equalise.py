"""Channels of a GGUF's matrices scaled against each other before they are encoded, where that leaves less error.

A norm, the values of attention or an up projection is divided by a factor for each of its channels, and the matrices
behind it are multiplied: the network computes the same, and what differs is the rounding. Large columns cost the blocks
that they lie in their precision, and columns of large inputs need more of it than others, so that

    factor_j = E[x_j**2]**(share / 2) / rms(W_j)**(1 - share)

brings columns to one size, and gives those with large inputs the larger one. (Lin et al. 2023, arXiv:2306.00978, search
an exponent of the inputs alone.) The share of a group is the one that leaves a sample of its rows the least weighted
error in the planned formats; a group that gains too little stays as it is.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from bitwright.calibration.control import Interrupted
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.architectures.architecture import known_architecture
from bitwright.converter.artifact.run import Run
from bitwright.converter.gguf.encode import encoding_errors
from bitwright.converter.gguf.folding import record
from bitwright.converter.job.job import Job
from bitwright.converter.job.kept import kept_json
from bitwright.converter.smoothing.folder import Folder
from bitwright.converter.smoothing.groups import Consumer, Link, SmoothingGroup, smoothing_groups
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.files.seals import is_sound
from bitwright.formats.quantized.decoded_tensor import DecodedTensor
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.plan import Plan, PlannedTensor
from bitwright.profiles.vocabulary import ModelMap

RESULT = "folding.json"
SHARES = (0.0, 0.1, 0.2, 0.3)
# A group is folded where that lowers its error by more than this share.
_LEAST_GAIN = 0.02
_SAMPLED_ROWS = 64
# Matrices of a group that are encoded for it, where there are more: experts, which look alike.
_MEASURED = 8


def foldable_groups(checkpoint: Checkpoint, model_map: ModelMap) -> list[SmoothingGroup]:
    """What could be folded of a model; nothing of a GGUF, whose tensors have other names than a data file, nor of a
    source that is quantized, whose weights lie on a grid that factors would move them from."""
    architecture = known_architecture(checkpoint.config)
    if checkpoint.metadata is not None or architecture is None or not architecture.feeds:
        return []
    if any(isinstance(tensor, DecodedTensor) for tensor in checkpoint.tensors.values()):
        return []
    return smoothing_groups(checkpoint, model_map)


def blank_record(job: Job, checkpoint: Checkpoint, model_map: ModelMap) -> str:
    """The record of a plan before its factors are known; "" where nothing will be folded."""
    return record.blank(foldable_groups(checkpoint, model_map)) if job.folding else ""


@dataclass(frozen=True)
class Equalised:
    """The run's checkpoint and importance folded as the record says."""

    record: str
    folder: Folder
    importance: ImportanceMatrix

    @property
    def checkpoint(self) -> Checkpoint:
        return self.folder.view()

    def note(self) -> str:
        """How many matrices are multiplied, for people."""
        n = sum(folding.columns is not None for folding in self.folder.foldings.values())
        return f"the columns of {n} matrices are scaled against each other, which the tensors before them make up for"


def equalise(run: Run, plan: Plan, importance: ImportanceMatrix, apart: Collection[str]) -> Equalised:
    """The factors stay in the work directory and are not looked for again. apart: GGUF tensors that are to be left as
    they are.

    Raises Interrupted when the run is to stop, which is asked after every layer.
    """

    def decide() -> dict[str, str]:
        return {"record": _decided(run, plan, importance, apart)}

    kept = kept_json(run.work_dir / RESULT, "record of folded factors", run.progress, decide)
    return _folded(run, kept["record"], importance)


def equalised_before(run: Run, importance: ImportanceMatrix) -> Equalised | None:
    """What `equalise` has decided in the job's work directory; None where that is lost."""
    path = run.work_dir / RESULT
    return _folded(run, json.loads(path.read_bytes())["record"], importance) if is_sound(path) else None


def _folded(run: Run, text: str, importance: ImportanceMatrix) -> Equalised:
    folder = record.folder_of(run.checkpoint, run.model_map, text, str(run.work_dir / RESULT))
    factors = folder.all_factors({spec.name: spec.n_matrices for spec in run.model_map.tensors})
    return Equalised(text, folder, importance.divided(factors))


def _decided(run: Run, plan: Plan, importance: ImportanceMatrix, apart: Collection[str]) -> str:
    layers = [
        list(groups)
        for _, groups in groupby(foldable_groups(run.checkpoint, run.model_map), key=lambda group: group.layer)
    ]
    rows: dict[str, list[PlannedTensor]] = defaultdict(list)
    for row in plan.tensors:
        for source in dict.fromkeys(row.tensor.sources):
            rows[source].append(row)
    chooser = _Chooser(run.checkpoint, rows, importance, frozenset(apart))
    texts = []
    with ThreadPoolExecutor(run.job.n_threads) as pool:
        for n_done, text in enumerate(pool.map(chooser.layer, layers), start=1):
            texts.append(text)
            run.progress("fold", n_done, len(layers), "layers")
            if run.should_stop() and n_done < len(layers):
                pool.shutdown(cancel_futures=True)
                raise Interrupted(f"stopped after {n_done} of {len(layers)} layers")
    return "".join(texts)


@dataclass(frozen=True)
class _Chooser:
    """rows: checkpoint tensor -> the rows of the plan that it is in."""

    checkpoint: Checkpoint
    rows: Mapping[str, Sequence[PlannedTensor]]
    importance: ImportanceMatrix
    apart: frozenset[str]

    def layer(self, groups: Sequence[SmoothingGroup]) -> str:
        """The record of a layer's groups. What is folded first changes the rows that the others measure."""
        folder, texts = Folder(self.checkpoint, norms="F32"), []
        for group in groups:
            for link, exponents in zip(group.links, self._group(folder, group), strict=True):
                if exponents.any():
                    folder.fold(link, record.factors_of(exponents))
                texts.append(record.written(exponents))
        return "".join(texts)

    def _group(self, folder: Folder, group: SmoothingGroup) -> list[np.ndarray]:
        """The exponents of every link, int64 [n_channels]; one share for all."""
        nothing = [np.zeros(record.channels(link), np.int64) for link in group.links]
        if not self._may_be_folded(group):
            return nothing
        links = [_Link(self, folder.view(), link) for link in group.links]
        used = sorted(links, key=lambda link: -link.n_seen)[:_MEASURED]
        before = [link.errors(None) for link in used]
        least, best = 1 - _LEAST_GAIN, None
        for share in SHARES:
            ratio = _ratio(
                [link.errors(link.exponents(share)) for link in used], before, [link.losses for link in used]
            )
            if ratio < least:
                least, best = ratio, share
        return nothing if best is None else [link.exponents(best) for link in links]

    def _may_be_folded(self, group: SmoothingGroup) -> bool:
        """Not what is kept in 16 bits, which a factor would round once more; nor where no matrix is encoded."""
        consumers = [consumer for link in group.links for consumer in link.consumers]
        members = {consumer.tensor for consumer in consumers}
        members |= {name for link in group.links for name in (link.producer, link.bias) if name is not None}
        encoded = [self.row(consumer) for consumer in consumers if consumer.quantized]
        return (
            all(len(self.rows[name]) == 1 and self._can_change(self.rows[name][0]) for name in members)
            and any(row.format != "F32" for row in encoded)
            and all(row.tensor.name in self.importance.names for row in encoded)
        )

    def _can_change(self, row: PlannedTensor) -> bool:
        layout, is_block = row.tensor.layout, get_format(row.format).block_size > 1
        kept = row.tensor.name in self.apart or row.pins or row.tensor.rescaled
        return not kept and not layout.transposed and layout.columns is None and (is_block or row.format == "F32")

    def row(self, consumer: Consumer) -> PlannedTensor:
        return self.rows[consumer.tensor][0]


class _Link:
    """A link with what its factors are computed from, and rows to try them on. view: of the checkpoint as it is folded
    so far. n_seen: tokens; losses: what the plan predicts that its matrices cost."""

    def __init__(self, chooser: _Chooser, view: Checkpoint, link: Link):
        self.chooser, self.link = chooser, link
        consumers = [c for c in link.consumers if c.quantized]
        inputs = chooser.importance.with_costs({})
        n_columns, n_rows = view.tensors[consumers[0].tensor].n_columns, 0
        energies, squares = np.zeros(n_columns), np.zeros(n_columns)
        for consumer in consumers:
            energies += _relative(inputs.columns(consumer.statistics[0])[consumer.statistics[1]])
            for part in view.blocks(consumer.tensor):
                squares += np.square(part, dtype=np.float64).sum(axis=0)
                n_rows += len(part)
        self.energies = self._of_channels(energies)
        self.sizes = np.sqrt(self._of_channels(squares) / max(1, n_rows))
        self.measured = [self._sample(view, consumer) for consumer in consumers[:_MEASURED]]
        self.n_seen = max(int(chooser.importance.counts[name][m]) for name, m in (c.statistics for c in consumers))
        self.losses = [chooser.row(consumer).predicted_loss for consumer in consumers[:_MEASURED]]

    def exponents(self, share: float) -> np.ndarray:
        """int64 [n_channels]; those of a channel without inputs or weights are 0."""
        live = (self.energies > 0) & (self.sizes > 0)
        logs = np.zeros(len(live))
        if live.any():
            logs[live] = share / 2 * np.log2(self.energies[live]) - (1 - share) * np.log2(self.sizes[live])
            logs[live] -= logs[live].mean()
        exponents: np.ndarray = np.rint(record.STEPS_PER_OCTAVE * logs).astype(np.int64)
        return exponents.clip(-record.LARGEST, record.LARGEST)

    def errors(self, exponents: np.ndarray | None) -> list[float]:
        """What is left of the sample of each matrix: squared and weighted with what an error in its column costs."""
        columns = np.float32(1) if exponents is None else self.link.spread(record.factors_of(exponents))
        errors = []
        for row, matrix, sample in self.measured:
            importance = self.chooser.importance.columns(row.tensor.name)[matrix] / np.square(columns)
            left = encoding_errors(row, sample * columns, importance)
            errors.append(float((np.square(left) * importance).sum()))
        return errors

    def _of_channels(self, columns: np.ndarray) -> np.ndarray:
        """The mean of all columns that a channel goes to."""
        if self.link.repeat == 1:
            return columns
        means: np.ndarray = columns.reshape(-1, self.link.repeat, self.link.head).mean(axis=1)
        return means.reshape(-1)

    def _sample(self, view: Checkpoint, consumer: Consumer) -> tuple[PlannedTensor, int, np.ndarray]:
        n_rows = view.tensors[consumer.tensor].n_rows
        chosen = np.unique(np.linspace(0, n_rows - 1, min(n_rows, _SAMPLED_ROWS)).astype(np.int64))
        return self.chooser.row(consumer), consumer.statistics[1], view.read_rows(consumer.tensor, chosen)


def _relative(columns: np.ndarray) -> np.ndarray:
    mean = columns.mean(dtype=np.float64)
    return columns / mean if mean > 0 else np.ones(len(columns))


def _ratio(
    after: Sequence[Sequence[float]], before: Sequence[Sequence[float]], losses: Sequence[Sequence[float | None]]
) -> float:
    """How much error is left, of a matrix in proportion to what it is predicted to cost, where that is known of all."""
    pairs = [pair for links in zip(after, before, strict=True) for pair in zip(*links, strict=True)]
    weights = [loss for link in losses for loss in link if loss is not None]
    if len(weights) < len(pairs) or not any(weights):
        weights = [1.0] * len(pairs)
    ratios = [a / b if b > 0 else (np.inf if a > 0 else 1.0) for a, b in pairs]
    return float(np.average(ratios, weights=weights)) if np.isfinite(ratios).all() else np.inf
