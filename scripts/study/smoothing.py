"""What smoothing does to W8A8: rounding errors of layers, and the divergence of a model that computes in integers.

Statistics come from a calibration text; the divergence is measured on text that no calibration sees. Weights are
encoded as the scheme W8A8 encodes them, products are exact integers; the output head stays as it is.
"""

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch

from bitwright.calibration.control import PassControl, never, silent
from bitwright.calibration.evaluation.quality import Baseline
from bitwright.calibration.passes.activation_pass import stream_activations
from bitwright.calibration.statistics.activation_ranges import static_range
from bitwright.calibration.statistics.activations import ActivationStatistics, InputRows
from bitwright.calibration.statistics.smoothing import SmoothQuantConfig, parse_alpha
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import load_corpus
from bitwright.converter.measure.activations import activation_names
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.model.model_map import describe
from bitwright.converter.report.text import table
from bitwright.converter.smoothing.groups import smoothing_groups
from bitwright.converter.smoothing.search import SmoothedGroup, Smoother
from bitwright.converter.source.open import open_checkpoint
from bitwright.converter.source.smoothed import SmoothedCheckpoint
from bitwright.formats.bfloat16 import bfloat16
from bitwright.formats.kernels.int8_matmul import int8_linear, quantize, quantize_per_token
from bitwright.formats.schemes.registry import get_scheme


class IntegerProducts:
    """Every matrix of the layers in W8A8, encoded when it is first used. scales: stored tensor -> static scale of its
    input; others are rounded token by token."""

    def __init__(self, scales: dict[str, float]):
        self.scales, self.scheme = scales, get_scheme("W8A8")
        self._weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def product(
        self, names: Sequence[str], inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        if ".layers." not in names[0] or names[0].endswith("mlp.gate.weight"):
            return None
        if names[0] not in self._weights:
            tensors = self.scheme.encode(weight.detach().float().contiguous().numpy(), effort="fast")
            self._weights[names[0]] = tensors["weight"], bfloat16(tensors["weight_scale"]).reshape(-1)
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).contiguous().numpy()
        scale = self.scales.get(names[0])
        values = quantize_per_token(rows, True) if scale is None else quantize(rows, np.array(scale, np.float32), None)
        products = torch.from_numpy(int8_linear(values, *self._weights[names[0]]))
        return (products if bias is None else products + bias).reshape(*inputs.shape[:-1], -1)

    def cached(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values


class Study:
    """A model, observed once, and its predictions of the evaluation text."""

    def __init__(self, model: Path, samples: int, directory: Path):
        self.directory, self.checkpoint = directory, open_checkpoint(str(model))
        self.model_map = describe(self.checkpoint)
        self.names = activation_names(self.model_map)
        tokenizer = load_tokenizer(model)
        self.corpus = load_corpus("embedded", tokenizer, samples, 512, 0)
        self.rows = InputRows(directory / "rows")
        self.activations = self._observe(self.checkpoint, self.rows)
        text = load_corpus("embedded", tokenizer, 16, 512, 0, split="test")
        source = StreamableModel(self.checkpoint, model, device="cpu")
        self.baseline = Baseline(source, text, PassControl(directory / "quality"))

    def smooth(self, alpha: str) -> tuple[SmoothedCheckpoint, ActivationStatistics, list[SmoothedGroup]]:
        smoother = Smoother(self.checkpoint, self.activations, self.rows)
        groups = smoothing_groups(self.checkpoint, self.model_map)
        decided = smoother.smooth(groups, SmoothQuantConfig(parse_alpha(alpha)), silent, never)
        view = smoother.folder.view()
        factors = smoother.folder.all_factors({spec.name: spec.n_matrices for spec in self.model_map.tensors})
        return view, self.activations.divided(factors, self._observe(view, None)), decided

    def _observe(self, source, rows: InputRows | None) -> ActivationStatistics:
        with tempfile.TemporaryDirectory(dir=self.directory) as work_dir:
            model = StreamableModel(source, self.checkpoint.location, device="cpu")
            return stream_activations(model, self.names, self.corpus, PassControl(Path(work_dir)), rows=rows)

    def divergence(self, source, activations: ActivationStatistics, method: str | None) -> list[str]:
        scales = {}
        if method is not None:
            for tensor, (name, matrix) in self.names.items():
                scales[tensor] = static_range(activations.of(name), matrix, method)[1] / 127.5  # type: ignore[arg-type]
        scores = self.baseline.stream_scores(source, arithmetic=IntegerProducts(scales))
        return [f"{scores[2].mean():.5f}", f"{scores[3].mean():.2%}", f"{np.exp(scores[1].mean()):.3f}"]


def error_rows(groups: list[SmoothedGroup]) -> list[list[str]]:
    """Means over the layers, by what is folded into."""
    by_kind: dict[str, list[SmoothedGroup]] = defaultdict(list)
    for group in groups:
        by_kind[group.name.split(".", 3)[3].removesuffix(".weight")].append(group)
    return [
        [
            kind,
            f"{np.mean([g.outlier_ratio_before for g in of]):.1f}",
            f"{np.mean([g.outlier_ratio for g in of]):.1f}",
            f"{np.mean([g.error_before or 0 for g in of]):.2e}",
            f"{np.mean([g.error or 0 for g in of]):.2e}",
        ]
        for kind, of in by_kind.items()
    ]


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True)
@click.option("--samples", default=16, show_default=True, help="Calibration sequences of 512 tokens.")
@click.option("--alpha", "alphas", multiple=True, default=("0.5", "auto"), show_default=True)
@click.option("--static", "methods", multiple=True, default=("mse", "absmax", "percentile"), show_default=True)
@click.option("--errors-only", is_flag=True, help="Leave the divergences out.")
def main(model: Path, samples: int, alphas: tuple[str, ...], methods: tuple[str, ...], errors_only: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        study = Study(model, samples, Path(directory))
        candidates = [("none", study.checkpoint, study.activations)]
        for alpha in alphas:
            view, activations, groups = study.smooth(alpha)
            candidates.append((alpha, view, activations))
            click.echo(f"alpha {alpha}:")
            click.echo(table(["folded into", "outliers x", "smoothed", "W8A8 error", "smoothed"], error_rows(groups)))
        if errors_only:
            return
        rows = []
        for alpha, source, activations in candidates:
            for method in (None, *methods):
                rows.append([alpha, method or "per token", *study.divergence(source, activations, method)])
                click.echo(" ".join(rows[-1]), err=True)
        click.echo(table(["alpha", "scales of inputs", "mean KLD", "top-1", "perplexity"], rows))


if __name__ == "__main__":
    main()
