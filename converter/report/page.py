"""The report as one page for people: a file without network or script, for light and dark, wide and narrow.

The page itself is page.html.j2; here is what it shows that the report does not hold as it is.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bitwright.converter.artifact.feedback import Outcome
from bitwright.converter.job.recipe import command_text
from bitwright.converter.report.data import Feedback, OnMachine, Report, UniformSize
from bitwright.converter.report.pictures import Cell, bits_figure, by_layer_and_role, cell_of, layer_totals
from bitwright.converter.report.run_lines import local_lines
from bitwright.converter.report.svg import MARK, Figure, bars, columns_chart, short
from bitwright.converter.report.templates import templates
from bitwright.converter.report.text import (
    agreement_text,
    corpus_text,
    feedback_text,
    figure,
    figures_text,
    perplexity_change,
)
from bitwright.converter.report.verdict import MEANINGS, findings, missed_target
from bitwright.profiles.mixes import MIXES
from bitwright.profiles.planning.labels import mix_bits
from bitwright.profiles.sizes import size_text
from bitwright.profiles.vocabulary import Role, TensorSpec

# What the artifact's size is shown beside: uniform formats, schemes and mixes that people know artifacts by.
_SHOWN_FORMATS = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ2_XXS", "IQ1_S")
_SHOWN_SCHEMES = ("W8A8", "FP8", "W4A16", "NVFP4")
_SHOWN_MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K", "IQ2_XXS")
_OWN = "this artifact"
_SHOWN_OUTCOMES = 10  # of error feedback: half of them the best, half the worst
_TEMPLATES = templates(
    "bitwright.converter.report",
    {
        "agreement_text": agreement_text,
        "corpus": corpus_text,
        "feedback_text": feedback_text,
        "figures_text": figures_text,
        "fmt": figure,
        "perplexity_change": perplexity_change,
        "short": short,
        "size": size_text,
    },
)


def report_page(report: Report, tensors: Sequence[Mapping[str, Any]]) -> str:
    """The page. tensors: the rows of plan.json."""
    return _TEMPLATES.get_template("page.html.j2").render(
        title=f"{report.model}, {report.profile}",
        mark="",
        report=report,
        meanings=MEANINGS,
        tensors=tensors,
        errors={error.tensor: error for error in report.errors},
        findings=[*filter(None, [missed_target(report)]), *findings(report)],
        size_figures=_size_figures(report, tensors),
        machine_figures=_machine_figures(report.machine) if report.machine else [],
        layer_figures=_layer_figures(report, tensors),
        outcomes=_shown_outcomes(report.feedback),
        command=command_text(list(report.arguments)),
        run_lines=local_lines(report.artifact, Path(report.artifact.location.name)),
    )


def ladder_page(reports: Sequence[Report]) -> str:
    """A page that compares artifacts of one model, the largest first."""
    ordered = sorted(reports, key=lambda report: -report.artifact.bytes)
    title, figures = f"{ordered[0].model}, {len(ordered)} artifacts", _ladder_figures(ordered)
    return _TEMPLATES.get_template("ladder.html.j2").render(title=title, mark="", reports=ordered, figures=figures)


def _ladder_figures(reports: Sequence[Report]) -> list[Figure]:
    """Sizes, and what was measured to be lost at each."""
    names = [report.artifact.location.name for report in reports]
    sizes = [report.artifact.bytes for report in reports]
    klds = [None if report.quality is None else report.quality.mean_kld for report in reports]
    lost = [(name, kld, short(kld)) for name, kld in zip(names, klds, strict=True) if kld is not None]
    figures = [
        bars("Size", "Bytes of each artifact.", [(n, s, size_text(s)) for n, s in zip(names, sizes, strict=True)]),
        bars("Divergence", "Mean KL divergence of each artifact from the source, nats a token.", lost),
    ]
    return figures if lost else figures[:1]


def figures_page(title: str, figures: Sequence[Figure]) -> str:
    """A page of nothing but figures."""
    return _TEMPLATES.get_template("figures.html.j2").render(title=title, mark=Markup(MARK), figures=figures)


def _layer_figures(report: Report, tensors: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Bits, errors and, where it was measured, predicted loss: by layer and role, and by layer."""
    errors = {error.tensor: error.weighted_error for error in report.errors}
    rows = [row for row in tensors if len(row["shape"]) > 1 and row["tensor"] in errors]

    def cells(value_of: Callable[[Mapping[str, Any]], float | None]) -> list[Cell]:
        return [
            Cell(row["tensor"], Role(row["role"]), row["layer"], value, f"{row['format']}, {short(value)}")
            for row in rows
            if (value := value_of(row)) is not None
        ]

    covered = report.super_weight_coverage.weights if report.super_weight_coverage is not None else ()
    places = [cell_of(weight.tensor, 0.0) for weight in covered]
    marked = [(cell.layer, cell.role) for cell in places if cell is not None and cell.layer is not None]
    layers = [layer for layer in report.layers if layer.layer is not None]
    figures = [
        bits_figure(cells(lambda row: row["bits_per_weight"])),
        by_layer_and_role(
            "Error",
            "Squared error over squared weight, weighted by importance, by layer and role.",
            cells(lambda row: errors[row["tensor"]]),
            legend="relative weighted error (logarithmic)" + ("; rings: super weights" if marked else ""),
            marked=marked,
        ),
    ]
    # Nothing where no sensitivity was measured, or not of the formats that the layers have.
    predicted = [cell for cell in cells(lambda row: row["predicted_loss"]) if cell.layer is not None]
    if predicted:
        figures += [
            by_layer_and_role(
                "Sensitivity",
                "Increase of the KL divergence that each tensor's encoding is expected to cost, by layer and role.",
                predicted,
                legend="nats a token (logarithmic)",
            ),
            columns_chart(
                "Sensitivity, whole layers",
                "Increase of the KL divergence that each layer's encoding is expected to cost.",
                layer_totals(predicted),
                text=short,
                notes=["Nats a token."],
            ),
        ]
    if layers:
        figures += [
            columns_chart(
                "Bits a weight, whole layers",
                "Bits a weight of each layer.",
                [layer.bits_per_weight for layer in layers],
                text=short,
            ),
            columns_chart(
                "Error, whole layers",
                "Mean weighted error of each layer's matrices.",
                [layer.weighted_error for layer in layers],
                text=short,
            ),
        ]
    return [figure for figure in figures if figure is not None]


def _machine_figures(machine: OnMachine) -> list[Figure]:
    """Where the time of a step goes."""
    shares = sorted(machine.shares.items(), key=lambda share: -share[1])
    rows = [(name, share, f"{share:.0%}") for name, share in shares]
    return [bars("A step's time", "The share of a step's time that each group of operators takes.", rows)]


def _size_figures(report: Report, tensors: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The artifact beside uniform formats and llama.cpp's mixes, and where its bytes are."""
    n_bytes = sum(row["bytes"] for row in tensors)
    shown = _shown_uniform(report, tensors)
    uniform = [(size.format + ("" if size.fits == 1 else "*"), size.bytes) for size in shown]
    partly = any(size.fits < 1 for size in shown)
    layers = [layer.bytes / 2**20 for layer in report.layers if layer.layer is not None]
    figures = [
        _beside(
            "Beside uniform formats",
            "Bytes of tensor data of this model in each format throughout, and of this artifact.",
            uniform,
            n_bytes,
            ["* rows that its blocks do not divide are in the next larger format that fits."] if partly else [],
        )
    ]
    if not report.artifact.is_directory:
        figures.append(
            _beside(
                "Beside llama.cpp's mixes",
                "Bytes of tensor data of this model in llama.cpp's mixes of formats, about, and of this artifact.",
                _mix_sizes(tensors),
                n_bytes,
                ["About: a mix's bits in the layers are those that it has in Llama-3.1-8B."],
            )
        )
    return [
        *figures,
        bars(
            "Where the bytes are",
            "Bytes of each group of tensors.",
            [(group.group, float(group.bytes), f"{group.share:.1%}") for group in report.groups],
        ),
        columns_chart("MiB, whole layers", "Bytes of each layer, in MiB.", layers, text=short),
    ]


def _beside(title: str, description: str, others: Iterable[tuple[str, int]], n_bytes: int, notes: list[str]) -> Figure:
    """The artifact among others, the largest first."""
    rows = sorted([*others, (_OWN, n_bytes)], key=lambda row: -row[1])
    return bars(
        title,
        description,
        [(name, float(n), size_text(n)) for name, n in rows],
        highlighted=[name for name, _ in rows].index(_OWN),
        notes=notes,
    )


def _shown_uniform(report: Report, tensors: Sequence[Mapping[str, Any]]) -> list[UniformSize]:
    """Those that people know, and the one that the artifact has most weights in."""
    weights: Counter[str] = Counter()
    for row in tensors:
        weights[row["format"]] += prod(row["shape"])
    uniform = {size.format: size for size in report.uniform}
    most_used = [name for name, _ in weights.most_common() if name in uniform][:1]
    known = _SHOWN_SCHEMES if report.artifact.is_directory else _SHOWN_FORMATS
    return [uniform[name] for name in dict.fromkeys([*known, *most_used]) if name in uniform]


def _mix_sizes(tensors: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """What the mixes that people know would take, and the one whose size is nearest."""
    specs = [TensorSpec(row["tensor"], tuple(row["shape"]), Role(row["role"]), row["layer"]) for row in tensors]
    matrices = sum(spec.n_weights for spec in specs if spec.quantizable)
    others = sum(row["bytes"] for row, spec in zip(tensors, specs, strict=True) if not spec.quantizable)
    sizes = {name: round(mix_bits(name, specs) * matrices / 8) + others for name in MIXES}
    n_bytes = sum(row["bytes"] for row in tensors)
    nearest = min(sizes, key=lambda name: abs(sizes[name] - n_bytes))
    return [(name, sizes[name]) for name in dict.fromkeys([*_SHOWN_MIXES, nearest])]


def _shown_outcomes(feedback: Feedback | None) -> list[Outcome]:
    """The best and the worst of the matrices whose error was measured."""

    def ratio(outcome: Outcome) -> float:
        return (outcome.feedback_error or 0.0) / (outcome.plain_error or 1.0)

    measured = [outcome for outcome in feedback.outcomes if outcome.plain_error] if feedback is not None else []
    measured.sort(key=ratio)
    half = _SHOWN_OUTCOMES // 2
    return measured if len(measured) <= _SHOWN_OUTCOMES else measured[:half] + measured[-half:]
