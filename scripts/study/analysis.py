"""How much text the analysis needs: the plan by gradients of few samples beside the plan by many.

    python -m scripts.study.analysis [MODEL] --imatrix FILE

For each number of samples the sensitivity table is measured, a budget of each size is planned by it, and the loss of
that plan is predicted by the table of the most samples: 1.00 is the plan that the most samples give. Printed, too: the
share of the weights that have another format.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from bitwright.calibration.control import never
from bitwright.calibration.sensitivity.fisher import stream_fisher
from bitwright.calibration.statistics.imatrix_file import load_imatrix
from bitwright.calibration.text.corpus import load_corpus
from bitwright.converter.job.build import build_job
from bitwright.converter.job.progress import Progress
from bitwright.converter.measure.evidence import evidence_of, matrices_of
from bitwright.converter.measure.running import load_tokenizer, streamable
from bitwright.converter.measure.sensitivity import CANDIDATE_FORMATS, Trials, build_sensitivity
from bitwright.converter.preparation import survey
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.reading.schema import load_profile
from scripts.smollm2 import build

WORK = Path(".cache/study-analysis")
SIZES = (2.6, 3.3, 4.25, 5.0)
LENGTH = 256


def evidences(model: Path, imatrix: Path, counts: list[int]) -> Iterator[tuple[int, Evidence]]:
    """What the plan would rest on, for each number of samples."""
    job = build_job(str(model), imatrix=imatrix, output=WORK / "planned.gguf", device="cpu")
    run = replace(survey(job), progress=Progress(), should_stop=never)
    run = replace(run, checkpoint=run.checkpoint.with_weights())
    importance = load_imatrix(imatrix)
    for count in counts:
        at = replace(run, work_dir=WORK / model.name / str(count))
        at.work_dir.mkdir(parents=True, exist_ok=True)
        corpus = load_corpus(None, load_tokenizer(model), count, LENGTH, 0)
        factors = stream_fisher(
            streamable(at, at.checkpoint, "float32"), matrices_of(at.model_map), corpus, at.control("analysis")
        )
        table = build_sensitivity(at, factors, importance.with_costs(factors.columns), Trials(CANDIDATE_FORMATS))
        yield count, evidence_of(table, at.checkpoint, at.model_map)


def loss_under(plan: Plan, evidence: Evidence) -> float:
    return sum(
        evidence.losses[row.tensor.name].get(row.format, 0.0)
        for row in plan.tensors
        if row.tensor.name in evidence.losses
    )


def changed(plan: Plan, other: Plan) -> float:
    """The share of the weights that have another format."""
    pairs = list(zip(plan.tensors, other.tensors, strict=True))
    return sum(a.tensor.n_weights for a, b in pairs if a.format != b.format) / plan.n_weights


@click.command(help=__doc__)
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--imatrix", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--counts", default="4,8,16,32,64", show_default=True, help=f"Samples of {LENGTH} tokens.")
@click.option("--fresh", is_flag=True, help="Forget what an earlier run has measured.")
def main(model: Path | None, imatrix: Path, counts: str, fresh: bool) -> None:
    if fresh:
        shutil.rmtree(WORK, ignore_errors=True)
    model = model or build(Path(".cache/smollm2-wide"), wide=True)
    measured = dict(evidences(model, imatrix, [int(count) for count in counts.split(",")]))
    model_map = survey(build_job(str(model), output=WORK / "planned.gguf")).model_map
    names = {tensor.name for tensor in model_map.tensors}
    plans = {
        (count, bpw): assign(
            load_profile("budget").aiming_at(None, bpw, None, "study"),
            model_map,
            evidence=evidence,
            with_importance=names,
        )
        for count, evidence in measured.items()
        for bpw in SIZES
    }
    most = max(measured)
    print("| samples | " + " | ".join(f"{bpw} bpw: loss, changed" for bpw in SIZES) + " |")
    print("|---" * (1 + len(SIZES)) + "|")
    for count in measured:
        cells = []
        for bpw in SIZES:
            best = plans[most, bpw]
            ratio = loss_under(plans[count, bpw], measured[most]) / loss_under(best, measured[most])
            cells.append(f"{ratio:.3f}, {changed(plans[count, bpw], best):.0%}")
        print(f"| {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
