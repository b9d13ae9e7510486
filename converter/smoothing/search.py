"""The factors of every group of a model, and what becomes of its tensors."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bitwright.calibration.control import Interrupted, OnProgress, ShouldStop
from bitwright.calibration.statistics.activations import ActivationStatistics, InputRows
from bitwright.calibration.statistics.smoothing import (
    Products,
    SmoothQuantConfig,
    choose_alpha,
    output_error,
    smoothing_factors,
)
from bitwright.converter.smoothing.folder import Folder
from bitwright.converter.smoothing.groups import Link, SmoothingGroup
from bitwright.converter.source.checkpoint import Checkpoint

# Rows of a matrix on which the error of outputs is measured, where it has more; and matrices of a group, where there
# are more experts: those that most tokens reach.
_MEASURED_ROWS = 1024
_MEASURED_EXPERTS = 8


@dataclass(frozen=True)
class SmoothedGroup:
    """What was decided for a group. alpha: None where it was left as it is. error_before, error: of the outputs with
    weights and inputs in INT8 by row, relative, on the kept rows, without smoothing and as decided; None where no token
    came. tried: what `auto` compared for every alpha that it tried: the same, or with static scales.
    outlier_ratio_before, outlier_ratio: the largest channel's absmax over the median one's; least, greatest: of the
    factors."""

    name: str
    layer: int
    alpha: float | None
    error_before: float | None
    error: float | None
    outlier_ratio_before: float
    outlier_ratio: float
    least: float
    greatest: float
    tried: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Smoother:
    """Smooths the groups one after the other, into `folder`. static: GGUF tensors whose inputs get a stored scale in
    INT8: `auto` looks for what suits these. device: what measures, as of calibration.statistics.smoothing.output_error.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        statistics: ActivationStatistics,
        rows: InputRows,
        static: Collection[str] = (),
        device: str = "cpu",
    ):
        self.checkpoint, self.statistics, self.rows, self.static = checkpoint, statistics, rows, static
        self.device, self.folder = device, Folder(checkpoint)

    def smooth(
        self,
        groups: list[SmoothingGroup],
        config: SmoothQuantConfig,
        progress: OnProgress,
        should_stop: ShouldStop,
    ) -> list[SmoothedGroup]:
        """Raises ConvertError for a matrix without statistics, and Interrupted when should_stop says so."""
        done = []
        for n_done, group in enumerate(groups, start=1):
            done.append(self._group(group, config))
            progress("smooth", n_done, len(groups), "groups")
            if should_stop() and n_done < len(groups):
                raise Interrupted(f"stopped after {n_done} of {len(groups)} groups")
        return done

    def _group(self, group: SmoothingGroup, config: SmoothQuantConfig) -> SmoothedGroup:
        links = [_Measured(self, link) for link in group.links]
        products = [p for link in self._most_used(links) if (p := link.products()) is not None]
        tried: dict[str, float] = {}
        alpha = None if config.alpha == "auto" else config.alpha
        before = after = None
        if products:
            if config.alpha == "auto":
                alpha, tried = choose_alpha(products, self._is_static(group), self.device)
            before, after = (output_error(products, a, device=self.device) for a in (None, alpha))
        factors = [np.ones_like(link.inputs) for link in links]
        if alpha is not None:
            factors = [
                self.folder.fold(link.link, smoothing_factors(link.inputs, link.columns, alpha)) for link in links
            ]
        inputs = np.concatenate([link.inputs for link in links])
        chosen = np.concatenate(factors)
        return SmoothedGroup(
            name=group.name,
            layer=group.layer,
            alpha=alpha,
            error_before=before,
            error=after,
            outlier_ratio_before=outlier_ratio(inputs),
            outlier_ratio=outlier_ratio(inputs / chosen),
            least=float(chosen.min()),
            greatest=float(chosen.max()),
            tried=tried,
        )

    def _is_static(self, group: SmoothingGroup) -> bool:
        return any(c.quantized and c.statistics[0] in self.static for link in group.links for c in link.consumers)

    def _most_used(self, links: list["_Measured"]) -> list["_Measured"]:
        return sorted(links, key=lambda link: -link.rows_seen)[:_MEASURED_EXPERTS]


class _Measured:
    """A link with what the factors are computed from. inputs, columns: float32 [n_channels], the largest magnitudes of
    the producer's channels, and of the consumers' columns that they go to; rows_seen: tokens."""

    def __init__(self, smoother: Smoother, link: Link):
        self.smoother, self.link = smoother, link
        n_channels = link.rows[1] - link.rows[0]
        self.inputs, self.columns = np.zeros(n_channels, np.float32), np.zeros(n_channels, np.float32)
        self.rows_seen = 0
        self._view = smoother.folder.view()
        for consumer in link.consumers:
            name, matrix = consumer.statistics
            seen = smoother.statistics.of(name)
            self.rows_seen = max(self.rows_seen, int(seen.counts[matrix]))
            np.maximum(self.inputs, link.gather(seen.absmax()[matrix]), out=self.inputs)
            if consumer.quantized:
                np.maximum(self.columns, link.gather(self._column_peaks(consumer.tensor)), out=self.columns)

    def products(self) -> Products | None:
        """None where no row of the inputs was kept: no token has come."""
        rows = self._rows()
        if rows is None or not len(rows):
            return None
        used = sorted(
            (c for c in self.link.consumers if c.quantized),
            key=lambda c: -int(self.smoother.statistics.of(c.statistics[0]).counts[c.statistics[1]]),
        )
        weights = tuple(self._some_rows(consumer.tensor) for consumer in used[:_MEASURED_EXPERTS])
        return Products(rows, weights, self.link.spread(self.inputs), self.link.spread(self.columns))

    def _rows(self) -> np.ndarray | None:
        for consumer in self.link.consumers:
            name, matrix = consumer.statistics
            if self.smoother.rows.has(name) and matrix in (rows := self.smoother.rows.read(name)):
                return rows[matrix]
        return None

    def _column_peaks(self, name: str) -> np.ndarray:
        peaks = np.zeros(self._view.tensors[name].n_columns, np.float32)
        for part in self._view.blocks(name):
            np.maximum(peaks, np.abs(part).max(axis=0), out=peaks)
        return peaks

    def _some_rows(self, name: str) -> np.ndarray:
        n_rows = self._view.tensors[name].n_rows
        if n_rows <= _MEASURED_ROWS:
            return self._view.read(name)
        return self._view.read_rows(name, np.linspace(0, n_rows - 1, _MEASURED_ROWS).astype(np.int64))


def outlier_ratio(peaks: np.ndarray) -> float:
    """The largest channel's absmax over the median one's, of those that are not always zero."""
    live = peaks[peaks > 0]
    return float(live.max() / np.median(live)) if len(live) else 0.0
