"""The sensitivity table held against what it predicts: the KL divergence of a model in which something is encoded.

One matrix at a time is encoded and decoded, all others stay as they are, and the mean KL divergence from the source is
measured beside the table's prediction: how well they agree in rank, and how large the prediction is. Then all matrices
at once, each in a format drawn at random, against the sum of the predictions.

Only the layers from the changed one on are run: the source's hidden states before every layer are kept. The text is of
the split that calibration never sees, and the second half of every sample is scored. A result is kept as soon as it is
there, and the same command goes on where it was stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch.nn.functional import log_softmax

from bitwright.calibration.sensitivity.table import SensitivityTable, load_sensitivity
from bitwright.calibration.statistics.imatrix_file import load_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.text.corpus import load_corpus
from bitwright.converter.measure.sensitivity import check_sensitivity, decode_encoded
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import read_rows, restore
from bitwright.converter.report.text import table
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.files.disk import file_sha256
from bitwright.formats.files.journal import append_line, read_lines
from bitwright.formats.registry import get_format
from bitwright.profiles.planning.assign import scale_of
from bitwright.profiles.vocabulary import ModelMap, TensorSpec

# From the fewest bits to the most; a random plan draws from some that follow each other.
LADDER = ("IQ1_M", "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")
DRAWN_FROM = 4
SAMPLES_AT_ONCE = 4


@dataclass(frozen=True)
class Result:
    """what: a tensor, or the number of a random plan; format: of the tensor, "" for a plan. Both divergences are in
    nats a token; bits: of a weight of what was encoded."""

    what: str
    format: str
    bits: float
    predicted: float
    measured: float


class Source:
    """The model and its text, with the hidden states before every layer and the predictions."""

    def __init__(self, directory: Path, tokens: np.ndarray):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
        self.body, self.layers = self.model.model, self.model.model.layers
        self.parameters = dict(self.model.named_parameters())
        self.tokens = torch.from_numpy(tokens.astype(np.int64))
        first = tokens.shape[1] // 2
        self.scored = slice(first, tokens.shape[1] - 1)
        with torch.inference_mode():
            self.states: list[list[torch.Tensor]] = [[] for _ in self.layers]
            hooks = [
                layer.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
                for layer, kept in zip(self.layers, self.states, strict=True)
            ]
            self.log_p = [self._log_probabilities(part, None) for part in range(len(self._parts()))]
            for hook in hooks:
                hook.remove()

    def divergence(self, weights: Mapping[str, np.ndarray], first_layer: int | None) -> float:
        """The mean KL divergence with these parameters in place of the source's; first_layer: the first one that they
        change, None for the embedding."""
        kept = {name: self.parameters[name].data for name in weights}
        try:
            for name, values in weights.items():
                self.parameters[name].data = torch.from_numpy(values)
            with torch.inference_mode():
                klds = []
                for part, log_p in enumerate(self.log_p):
                    log_q = self._log_probabilities(part, first_layer)
                    klds.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
                return float(torch.cat(klds).double().mean())
        finally:
            for name, values in kept.items():
                self.parameters[name].data = values

    def _parts(self) -> list[torch.Tensor]:
        return list(self.tokens.split(SAMPLES_AT_ONCE))

    def _log_probabilities(self, part: int, first_layer: int | None) -> torch.Tensor:
        """float32 [n_samples, n_scored, vocabulary], with the layers from first_layer on."""
        if first_layer is None:
            states = self.body(input_ids=self._parts()[part], use_cache=False).last_hidden_state
        elif first_layer == len(self.layers):
            states = self._run(len(self.layers) - 1, part)
        else:
            states = self._run(first_layer, part)
        return log_softmax(self.model.lm_head(states[:, self.scored]), -1)

    def _run(self, first_layer: int, part: int) -> torch.Tensor:
        self.body.layers = self.layers[first_layer:]
        try:
            return self.body(inputs_embeds=self.states[first_layer][part], use_cache=False).last_hidden_state
        finally:
            self.body.layers = self.layers


class Encoded:
    """What the product's encoders make of the model's matrices, as weights of the checkpoint."""

    def __init__(
        self, checkpoint: Checkpoint, model_map: ModelMap, importance: ImportanceMatrix, table: SensitivityTable
    ):
        self.checkpoint, self.table = checkpoint, table
        self.importance = importance.with_costs(table.factors.columns)
        self.tensors = [tensor for tensor in model_map.tensors if tensor.quantizable]
        self.n_layers = model_map.n_layers

    def first_layer(self, tensor: TensorSpec) -> int | None:
        if tensor.layer is None:
            return None if tensor.role == "embedding" else self.n_layers
        return tensor.layer

    def weights(self, tensor: TensorSpec, format_name: str) -> dict[str, np.ndarray]:
        rows = read_rows(self.checkpoint, tensor, 0, tensor.n_rows).reshape(tensor.n_matrices, -1, tensor.n_columns)
        known = tensor.name in self.importance.names
        columns = self.importance.columns(tensor.name) if known else [None] * tensor.n_matrices
        scaled = scale_of(tensor, format_name) is not None
        decoded = [
            decode_encoded(
                get_format(format_name),
                np.ascontiguousarray(matrix),
                of_matrix,
                self.table.effort,
                float(np.abs(matrix).max()) if scaled else None,
            )
            for matrix, of_matrix in zip(rows, columns, strict=True)
        ]
        restored = restore(tensor, np.concatenate(decoded))
        return {name: np.ascontiguousarray(values) for name, values in restored.items()}


def singles(source: Source, encoded: Encoded, formats: Sequence[str], results: "Results") -> None:
    for format_name in formats:
        for tensor in encoded.tensors:
            if (tensor.name, format_name) not in results and get_format(format_name).fits(tensor.n_columns):
                measured = source.divergence(encoded.weights(tensor, format_name), encoded.first_layer(tensor))
                bits = get_format(format_name).bits_per_weight
                predicted = encoded.table.loss(tensor.name, format_name)
                results.add(Result(tensor.name, format_name, bits, predicted, measured))


def plans(source: Source, encoded: Encoded, n_plans: int, results: "Results") -> None:
    """Plan i draws from DRAWN_FROM formats of the ladder that follow each other, beginning with another one each."""
    for i in range(n_plans):
        if (str(i), "") in results:
            continue
        first = i % (len(LADDER) - DRAWN_FROM + 1)
        random = np.random.default_rng(i)
        chosen = {tensor.name: str(random.choice(LADDER[first : first + DRAWN_FROM])) for tensor in encoded.tensors}
        weights: dict[str, np.ndarray] = {}
        for tensor in encoded.tensors:
            weights |= encoded.weights(tensor, chosen[tensor.name])
        n_bits = sum(tensor.n_weights * get_format(chosen[tensor.name]).bits_per_weight for tensor in encoded.tensors)
        bits = n_bits / sum(tensor.n_weights for tensor in encoded.tensors)
        predicted = sum(encoded.table.loss(name, format_name) for name, format_name in chosen.items())
        results.add(Result(str(i), "", bits, predicted, source.divergence(weights, None)))


class Results:
    """A file of JSON lines: the identity of table and text, then the results."""

    def __init__(self, path: Path, identity: Mapping[str, object]):
        self.path = path
        if not path.exists():
            append_line(path, identity)
        first, *lines = read_lines(path)
        if first != identity:
            raise SystemExit(f"{path} holds the results of another table or text; name another file with --results")
        self.all = [Result(**line) for line in lines]

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in {(result.what, result.format) for result in self.all}

    def add(self, result: Result) -> None:
        self.all.append(result)
        append_line(self.path, asdict(result))
        click.echo(f"{result.what} {result.format}: {result.measured:.5f}, predicted {result.predicted:.5f}", err=True)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; no two values are equal."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def report(results: Sequence[Result]) -> str:
    parts = []
    rows = []
    for format_name in dict.fromkeys(result.format for result in results if result.format):
        of_format = [result for result in results if result.format == format_name]
        predicted, measured = (np.array([getattr(r, key) for r in of_format]) for key in ("predicted", "measured"))
        ratios = predicted / measured
        low, median, high = np.quantile(ratios, [0.1, 0.5, 0.9])
        rows.append(
            [
                format_name,
                str(len(of_format)),
                f"{rank_correlation(predicted, measured):.3f}",
                f"{predicted.sum():.4f}",
                f"{measured.sum():.4f}",
                f"{predicted.sum() / measured.sum():.2f}",
                f"{median:.2f}",
                f"{low:.2f} to {high:.2f}",
            ]
        )
    header = [
        "one tensor in",
        "tensors",
        "rank corr.",
        "predicted",
        "measured",
        "ratio",
        "median",
        "80 % of the ratios",
    ]
    parts.append(table(header, rows))
    whole = sorted((result for result in results if not result.format), key=lambda result: result.bits)
    if whole:
        rows = [
            [r.what, f"{r.bits:.2f}", f"{r.predicted:.4f}", f"{r.measured:.4f}", f"{r.predicted / r.measured:.2f}"]
            for r in whole
        ]
        parts.append(table(["plan", "bits", "predicted", "measured", "ratio"], rows))
        predicted, measured = (np.array([getattr(r, key) for r in whole]) for key in ("predicted", "measured"))
        parts.append(f"rank correlation over the plans: {rank_correlation(predicted, measured):.3f}")
    return "\n\n".join(parts)


@click.command()
@click.option("--model", type=click.Path(path_type=Path), default=Path(".cache/smollm2-wide"), show_default=True)
@click.option("--imatrix", type=click.Path(path_type=Path), required=True)
@click.option("--sensitivity", type=click.Path(path_type=Path), required=True)
@click.option("--results", type=click.Path(path_type=Path), required=True, help="JSON lines; continued where it ends.")
@click.option("--formats", default="Q2_K,Q3_K", show_default=True, help="In which single tensors are encoded.")
@click.option("--plans", "n_plans", default=10, show_default=True, help="Random mixed plans.")
@click.option("--samples", default=8, show_default=True)
@click.option("--sequence-length", default=256, show_default=True)
def main(
    model: Path,
    imatrix: Path,
    sensitivity: Path,
    results: Path,
    formats: str,
    n_plans: int,
    samples: int,
    sequence_length: int,
) -> None:
    """Measured KL divergences beside the predictions of a sensitivity table."""
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(str(model))
    model_map = describe(checkpoint)
    sensitivities = load_sensitivity(sensitivity)
    check_sensitivity(sensitivities, checkpoint, model_map)
    encoded = Encoded(checkpoint, model_map, load_imatrix(imatrix), sensitivities)
    corpus = load_corpus("embedded", AutoTokenizer.from_pretrained(model), samples, sequence_length, split="test")
    identity = {
        "sensitivity": file_sha256(sensitivity),
        "imatrix": file_sha256(imatrix),
        "samples": samples,
        "sequence_length": sequence_length,
    }
    kept, source = Results(results, identity), Source(model, corpus.tokens)
    plans(source, encoded, n_plans, kept)
    singles(source, encoded, [name for name in formats.split(",") if name], kept)
    click.echo(report(kept.all))


if __name__ == "__main__":
    main()
