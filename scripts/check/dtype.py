"""How far importance in bfloat16 is from that in float32: the same text through the same model, in either dtype.

Of every matrix the mean squared inputs of its columns are compared, each relative to itself, and the whole matrix by
the sum of the differences over the sum. bfloat16 is the default of CPUs that are faster with it as long as the median
of the columns and the median matrix are within 1 %.
"""

import tempfile
from pathlib import Path

import click
import numpy as np

from bitwright.calibration.choices import Dtype
from bitwright.calibration.control import PassControl
from bitwright.calibration.passes.importance_pass import stream_importance
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import EMBEDDED, Corpus, load_corpus
from bitwright.converter.job.progress import Progress
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.model.model_map import describe
from bitwright.converter.report.text import table
from bitwright.converter.source.open import open_checkpoint

MOST = 0.01


def importance(model: Path, corpus: Corpus, dtype: Dtype, progress: Progress) -> ImportanceMatrix:
    checkpoint = open_checkpoint(str(model))
    names = observed_names(describe(checkpoint))
    with tempfile.TemporaryDirectory() as work_dir:
        streamable = StreamableModel(checkpoint, model, device="cpu", dtype=dtype)
        return stream_importance(streamable, names, corpus, PassControl(Path(work_dir), progress))


def differences(exact: ImportanceMatrix, short: ImportanceMatrix) -> tuple[np.ndarray, np.ndarray]:
    """Relative to the exact ones: of every column of every matrix, and of every matrix."""
    columns, matrices = [], []
    for name, sums in exact.sums.items():
        off, seen = np.abs(short.sums[name] - sums), sums > 0
        columns.append((off[seen] / sums[seen]).ravel())
        matrices.append(off.sum() / sums.sum())
    return np.concatenate(columns), np.array(matrices)


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--samples", default=16, show_default=True)
@click.option("--sequence-length", default=256, show_default=True)
def main(model: Path, samples: int, sequence_length: int) -> None:
    corpus, progress = load_corpus(EMBEDDED, load_tokenizer(model), samples, sequence_length), Progress()
    exact, short = (importance(model, corpus, dtype, progress) for dtype in ("float32", "bfloat16"))
    both = dict(zip(("columns", "matrices"), differences(exact, short), strict=True))
    quantiles = (0.5, 0.9, 0.99, 1.0)
    rows = [
        [name, str(of.size), *(f"{100 * value:.2f} %" for value in np.quantile(of, quantiles))]
        for name, of in both.items()
    ]
    print(table(["of", "number", "median", "90 % within", "99 % within", "all within"], rows))
    if any(np.median(of) > MOST for of in both.values()):
        raise SystemExit(f"a median is beyond {100 * MOST:g} %")


if __name__ == "__main__":
    main()
