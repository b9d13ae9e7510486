"""The report as one page for people: a file without network or script, for light and dark, wide and narrow."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from converter.pictures import Cell, by_layer_and_role, cell_of, layer_totals
from converter.progress import size_text
from converter.recipe import command_text
from converter.report import PROMISES, agreement_text, feedback_text, figure, perplexity_change
from converter.svg import MARK, Figure, bars, columns_chart, short, style_sheet
from converter.verdict import COHERENT, FAILED, NOTICEABLE, SEVERE, findings, missed_target
from profiles.vocabulary import Role

# Uniform formats that the artifact's size is shown beside: those that people know files by.
_SHOWN_FORMATS = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ2_XXS", "IQ1_S")
_BANNERS = {
    COHERENT: ("Coherent", "What it writes holds together, and its predictions stay close to the source's."),
    NOTICEABLE: ("Noticeable loss", "It works, and whoever knows the source will see the difference."),
    SEVERE: ("Severely damaged", "It should not be used as it is."),
    FAILED: ("Failed", "It no longer writes text, or its predictions diverge."),
}


def report_page(report: dict[str, Any], tensors: Sequence[dict[str, Any]]) -> str:
    """The page. report: what report.json holds; tensors: the rows of plan.json."""
    figures = layer_figures(report, tensors)
    names = [Path(file["path"]).name for file in report["artifact"]["files"]]
    shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    revision = f" at {report['revision']}" if report["revision"] else ""
    parts = [
        '<p class="eyebrow">Conversion report</p>',
        f"<h1>{escape(report['model'])}</h1>",
        f'<p class="under">{escape(shown)}, profile {escape(report["profile"])}{escape(revision)}</p>',
        _banner(report),
        _numbers(report),
        *_section("What it writes", _answers(report["coherence"])),
        *_section("What the runtime computes", _runtime(report["agreement"])),
        *_section("Size", _size(report, tensors)),
        *_section("Layer by layer", _figures(figures) + _layer_table(report)),
        *_section("Super weights", _super_weight_table(report)),
        *_section("Measured", _measured(report)),
        *_section("How it was made", _making(report)),
        *_section("Every tensor", _tensor_table(report, tensors)),
    ]
    return page(f"{report['model']}, {report['profile']}", parts)


def figures_page(title: str, figures: Sequence[Figure]) -> str:
    """A page of nothing but figures."""
    return page(title, [f"<h1>{escape(title)}</h1>", _figures(figures)], MARK)


def page(title: str, parts: Iterable[str], mark: str = "") -> str:
    """A whole page. What it may load is forbidden to it: nothing. mark: a comment at its beginning."""
    return (
        f'<!doctype html>\n<html lang="en"><head>{mark}<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{style_sheet('figure.css')}{style_sheet('page.css')}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def layer_figures(report: dict[str, Any], tensors: Sequence[dict[str, Any]]) -> list[Figure]:
    """Bits, errors and, where it was measured, predicted loss: by layer and role, and by layer."""
    errors = {error["tensor"]: error for error in report["errors"]}
    rows = [row for row in tensors if len(row["shape"]) > 1 and row["tensor"] in errors]

    def cells(value: str, source: dict[str, dict[str, Any]]) -> list[Cell]:
        return [
            Cell(
                row["tensor"],
                Role(row["role"]),
                row["layer"],
                source[row["tensor"]][value],
                f"{row['format']}, {short(source[row['tensor']][value])}",
            )
            for row in rows
            if source[row["tensor"]][value] is not None
        ]

    plan = {row["tensor"]: row for row in rows}
    places = [cell_of(weight["tensor"], 0.0) for weight in _super_weights(report)]
    marked = [(cell.layer, cell.role) for cell in places if cell is not None and cell.layer is not None]
    layers = [row for row in report["layers"] if row["layer"] is not None]
    found = [
        by_layer_and_role(
            "Bits a weight",
            "Bits a weight of every matrix, by layer and role.",
            cells("bits_per_weight", plan),
            logarithmic=False,
            legend="bits (stronger is more)",
        ),
        by_layer_and_role(
            "Error",
            "Squared error over squared weight, weighted by importance, by layer and role.",
            cells("weighted_error", errors),
            legend="relative weighted error (logarithmic)" + ("; rings: super weights" if marked else ""),
            marked=marked,
        ),
    ]
    # Nothing where no sensitivity was measured, or not of the formats that the layers have.
    predicted = [cell for cell in cells("predicted_loss", plan) if cell.layer is not None]
    if predicted:
        found += [
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
        found.append(
            columns_chart(
                "Bits a weight, whole layers",
                "Bits a weight of each layer.",
                [row["bits_per_weight"] for row in layers],
                text=short,
            )
        )
        found.append(
            columns_chart(
                "Error, whole layers",
                "Mean weighted error of each layer's matrices.",
                [row["weighted_error"] for row in layers],
                text=short,
            )
        )
    return [figure for figure in found if figure is not None]


def _section(title: str, body: str) -> list[str]:
    return [f"<section><h2>{escape(title)}</h2>{body}</section>"] if body else []


def _figures(figures: Sequence[Figure]) -> str:
    return f'<div class="figures">{"".join(f"<figure class=card>{f.svg()}</figure>" for f in figures)}</div>'


def _banner(report: dict[str, Any]) -> str:
    verdict = report["verdict"]
    if verdict is None:
        return '<div class="banner noticeable"><strong>Not measured</strong>Quality was not asked for.</div>'
    title, text = _BANNERS[verdict]
    found = [*filter(None, [missed_target(report)]), *findings(report)]
    items = f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in found)}</ul>" if found else ""
    better = f"A better recipe:<pre>{escape(report['better'])}</pre>" if report["better"] else ""
    return f'<div class="banner {verdict}"><strong>{title}</strong>{text}{items}{better}</div>'


def _numbers(report: dict[str, Any]) -> str:
    source, artifact = report["source"]["bytes"], report["artifact"]["bytes"]
    n_weights = sum(row["weights"] for row in report["layers"])
    n_bytes = sum(row["bytes"] for row in report["layers"])
    entries = [
        ("Size", size_text(artifact), f"{report['compression_ratio']:.2f}x smaller than {size_text(source)}"),
        ("Bits a weight", f"{n_bytes * 8 / n_weights:.2f}", f"{n_weights / 1e6:,.1f} million weights"),
    ]
    if quality := report["quality"]:
        of_source = f"source {figure(quality['source_perplexity'], '.2f')}, {perplexity_change(quality)}"
        entries += [
            ("Perplexity", figure(quality["perplexity"], ".2f"), of_source),
            (
                "KL divergence",
                figure(quality["mean_kld"], ".4f"),
                f"nats a token; 99.9 %: {figure(quality['kld_99_9'], '.2f')}",
            ),
            ("Same top token", f"{quality['top1_agreement']:.1%}", f"of {quality['tokens']:,} tokens"),
        ]
        if quality["words"]:
            entries.append(
                (
                    "Next word found",
                    f"{quality['next_word_accuracy']:.1%}",
                    f"source {quality['source_next_word_accuracy']:.1%} of {quality['words']:,} words",
                )
            )
    if coherence := report["coherence"]:
        whole = sum(not row["problems"] for row in coherence["prompts"])
        entries.append(("Answers that hold together", f"{whole} of {len(coherence['prompts'])}", "to fixed prompts"))
        entries.append(
            (
                "Same greedy text",
                f"{coherence['greedy_agreement']:.0%}",
                f"over {coherence['greedy_tokens']} tokens; {coherence['greedy_common_prefix']:.1f} alike on average",
            )
        )
    cells = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in entries)
    return f'<dl class="numbers">{"".join(cells)}</dl>'


def _answers(coherence: dict[str, Any] | None) -> str:
    if coherence is None:
        return ""
    note = next(iter(coherence["runtime_note"].values()), "")
    by = f"Generated by {coherence['runtime']}" + (f" ({note})" if note else "")
    intro = (
        f"<p>{escape(by)}, each token the most probable one, {coherence['greedy_tokens']} at most. Underlined is what"
        " follows the first token that the source would not have chosen; another text is not a worse one.</p>"
    )
    return intro + "".join(_answer(row) for row in coherence["prompts"])


def _runtime(agreement: dict[str, Any] | None) -> str:
    """What the true runtime computes beside our own evaluation of the same artifact."""
    if agreement is None:
        return ""
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in agreement["reasons"])
    return f"<p>{escape(agreement_text(agreement))}</p>" + (f"<ul>{reasons}</ul>" if reasons else "")


def _answer(row: dict[str, Any]) -> str:
    same = row["agreed_text"] if row["text"].startswith(row["agreed_text"]) else ""
    rest = row["text"][len(same) :]
    written = escape(same) + (f'<span class="other">{escape(rest)}</span>' if rest else "")
    measure = f"{row['agreed']} of {row['tokens']} tokens alike"
    if row["entropy"] is not None and row["source_entropy"] is not None:
        measure += (
            f"; entropy {row['entropy']:.2f} nats (source {row['source_entropy']:.2f}); the source finds"
            f" {row['surprise']:.2f} nats a token in it ({row['source_surprise']:.2f} in its own)"
        )
    problems = "".join(f'<p class="problem">{escape(p["kind"])}: {escape(p["detail"])}</p>' for p in row["problems"])
    return (
        f'<div class="answer"><h3>{escape(row["prompt"])}</h3><div class="both">'
        f'<div><h4>source</h4><p class="written">{escape(row["source_text"])}</p></div>'
        f'<div><h4>artifact</h4><p class="written">{written}</p></div></div>{problems}'
        f'<p class="measure">{escape(measure)}</p></div>'
    )


def _size(report: dict[str, Any], tensors: Sequence[dict[str, Any]]) -> str:
    n_bytes = sum(row["bytes"] for row in tensors)
    uniform = {row["format"]: row for row in report["uniform"]}
    shown = [uniform[name] for name in _SHOWN_FORMATS if name in uniform]
    rows = [(row["bytes"], row["format"] + ("" if row["fits"] == 1 else "*")) for row in shown] + [(n_bytes, "")]
    rows.sort(key=lambda row: -row[0])
    partly = any(row["fits"] < 1 for row in shown)
    chart = bars(
        "Beside uniform formats",
        "Bytes of tensor data of this model in each format throughout, and of this artifact.",
        [(name or "this file", float(size), size_text(size)) for size, name in rows],
        highlighted=[name for _, name in rows].index(""),
        notes=["* rows that its blocks do not divide are in the next larger format that fits."] if partly else [],
    )
    share = bars(
        "Where the bytes are",
        "Bytes of each group of tensors.",
        [(row["group"], float(row["bytes"]), f"{row['share']:.1%}") for row in report["groups"]],
    )
    table = _table(
        ["group", "formats", "weights", "bytes", "bits", "share"],
        [
            [
                row["group"],
                ", ".join(f"{n} x {name}" for name, n in row["formats"].items()),
                f"{row['weights'] / 1e6:,.1f} M",
                size_text(row["bytes"]),
                f"{row['bits_per_weight']:.2f}",
                f"{row['share']:.1%}",
            ]
            for row in report["groups"]
        ],
        "Groups of tensors",
    )
    inside = [row["bytes"] / 2**20 for row in report["layers"] if row["layer"] is not None]
    by_layer = columns_chart("MiB, whole layers", "Bytes of each layer, in MiB.", inside, text=short)
    return _figures([chart, share, by_layer]) + table


def _layer_table(report: dict[str, Any]) -> str:
    rows = [
        [
            "outside" if row["layer"] is None else str(row["layer"]),
            f"{row['weights'] / 1e6:,.2f} M",
            size_text(row["bytes"]),
            f"{row['share']:.2%}",
            f"{row['bits_per_weight']:.3f}",
            f"{row['relative_error']:.2e}",
            f"{row['weighted_error']:.2e}",
            ", ".join(f"{name} {share:.0%}" for name, share in row["formats"].items()),
        ]
        for row in report["layers"]
    ]
    header = ["layer", "weights", "bytes", "share", "bits", "error", "weighted error", "formats"]
    return f"<details><summary>The numbers</summary>{_table(header, rows, 'Layers')}</details>"


def _super_weights(report: dict[str, Any]) -> list[dict[str, Any]]:
    coverage = report["super_weight_coverage"]
    return coverage["weights"] if coverage is not None else []


def _super_weight_table(report: dict[str, Any]) -> str:
    coverage = report["super_weight_coverage"]
    if coverage is None:
        return ""
    if not coverage["confirmed"]:
        return "<p>Looked for, and none found.</p>"
    intro = (
        f"<p>{coverage['within']} of {coverage['confirmed']} come out of the artifact within"
        f" {coverage['tolerance']:.1%} of their value.</p>"
    )
    rows = [
        [
            w["tensor"],
            f"{w['matrix']}, {w['row']}, {w['column']}",
            short(w["value"]),
            short(w["decoded"]),
            f"{w['relative_error']:.2%}",
            "yes" if w["within"] else "no",
        ]
        for w in coverage["weights"]
    ]
    header = ["tensor", "matrix, row, column", "value", "decoded", "error", "within"]
    return intro + _table(header, rows, "Super weights")


def _measured(report: dict[str, Any]) -> str:
    worst = sorted(report["errors"], key=lambda e: -e["weighted_error"])[:5]
    worst_rows = [[e["tensor"], e["format"], f"{e['relative_error']:.2e}", f"{e['weighted_error']:.2e}"] for e in worst]
    parts = [
        _quality_table(report) if report["quality"] else "",
        _task_table(report["tasks"]) if report["tasks"] else "",
        _feedback_table(report["feedback"]) if report["feedback"] else "",
        _table(["largest errors", "format", "error", "weighted error"], worst_rows, "Largest errors"),
        _terms(report["quality"]),
    ]
    return "".join(parts)


def _feedback_table(feedback: dict[str, Any]) -> str:
    """What error feedback did, and where it was left out; the best and the worst of the matrices that were measured."""
    intro = f"<p>Error feedback {escape(feedback_text(feedback))}.</p>"
    measured = [o for o in feedback["outcomes"] if o["plain_error"]]
    measured.sort(key=lambda o: o["feedback_error"] / o["plain_error"])
    shown = measured if len(measured) <= 10 else measured[:5] + measured[-5:]
    rows = [
        [
            o["tensor"] + (f", matrix {o['matrix']}" if o["matrix"] else ""),
            f"{o['plain_error']:.2e}",
            f"{o['feedback_error']:.2e}",
            f"{o['feedback_error'] / o['plain_error']:.2f}",
            "yes" if o["kept"] else "no",
        ]
        for o in shown
    ]
    header = ["output error", "without", "with feedback", "ratio", "kept"]
    return intro + _table(header, rows, "Error feedback")


def _quality_table(report: dict[str, Any]) -> str:
    quality, coherence = report["quality"], report["coherence"]
    promises = [(what, report[key]) for key, what in PROMISES.items() if report[key] is not None]
    rows = [
        ["perplexity", *(figure(quality[key], ".4f") for key in ("source_perplexity", "perplexity"))],
        ["KL divergence, mean", "", figure(quality["mean_kld"], ".5f")],
        *([f"KL divergence, {what}", "", f"{kld:.5f}"] for what, kld in promises),
        ["KL divergence, 99 %", "", figure(quality["kld_99"], ".4f")],
        ["KL divergence, 99.9 %", "", figure(quality["kld_99_9"], ".4f")],
        ["KL divergence, largest", "", figure(quality["max_kld"], ".4f")],
        ["same top token", "", f"{quality['top1_agreement']:.2%}"],
    ]
    if quality["words"]:
        accuracies = (quality["source_next_word_accuracy"], quality["next_word_accuracy"])
        rows.append(["next word found", *(f"{share:.2%}" for share in accuracies)])
    if coherence:
        rows += [
            ["same greedy text", "", f"{coherence['greedy_agreement']:.1%}"],
            ["greedy tokens alike", "", f"{coherence['greedy_common_prefix']:.2f} of {coherence['greedy_tokens']}"],
        ]
    return _table(["", "source", "artifact"], rows, "Quality")


def _task_table(tasks: dict[str, Any]) -> str:
    examples = f", {tasks['limit']} examples" if tasks["limit"] else ""
    rows = [[task + examples, n, f"{v:.4g}"] for task, found in tasks["results"].items() for n, v in found.items()]
    return _table(["task", "metric", "artifact"], rows, "Tasks")


def _terms(quality: dict[str, Any] | None) -> str:
    """What the figures mean."""
    terms = {"errors": "squared error over squared weights, plain and weighted by importance, decoded from the files."}
    if quality:
        terms |= {
            "perplexity, divergence": f"over {quality['tokens']:,} tokens of {quality['corpus']}, held out from the"
            f" calibration: the second half of {quality['samples']} samples of {quality['sequence_length']} tokens."
            " Divergence is of the artifact from the source, in nats a token. Perplexities compare within a report"
            " only.",
            "runtime agreement": "text as the true runtime cuts it beside the source's tokenizer, where it ends beside"
            " where the source does, and the divergence of its predictions from our own evaluation of the"
            " same artifact. A runtime rounds the inputs of its products, so a small divergence is no error.",
            "next word found": f"the share of {quality['words']:,} words of the same text whose every token is the most"
            " probable one after the true text before it. A word begins with a token of a space and letters and goes"
            " on over tokens of letters.",
            "same greedy text": "held-out beginnings, continued by the most probable token: the share of continuations"
            " that equal the source's to the last token, and the mean number of tokens before the first that differs.",
        }
    meaning = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items())
    return f'<dl class="terms">{meaning}</dl>'


def _making(report: dict[str, Any]) -> str:
    files = [[Path(f["path"]).name, f"{f['bytes']:,}", f["sha256"]] for f in report["artifact"]["files"]]
    facts = [["plan", report["plan_sha256"]], ["tool", report["tool"]]]
    if calibration := report["calibration"]:
        text = f"{calibration['corpus']}, {calibration['samples']} samples of {calibration['sequence_length']} tokens"
        facts += [["calibration", text], ["importance", f"{calibration['file']} {calibration['sha256']}"]]
    seconds = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report["seconds"].items())
    facts.append(["seconds", seconds])
    return (
        f"<pre>{escape(command_text(report['arguments']))}</pre>"
        + _table(["file", "bytes", "SHA-256"], files, "Files", wrap=True)
        + _table(["", ""], facts, "Facts", wrap=True)
    )


def _tensor_table(report: dict[str, Any], tensors: Sequence[dict[str, Any]]) -> str:
    errors = {error["tensor"]: error for error in report["errors"]}
    rows = [
        [
            row["tensor"],
            "x".join(map(str, row["shape"])),
            row["format"],
            f"{row['bytes']:,}",
            f"{row['bits_per_weight']:.2f}",
            f"{errors[row['tensor']]['weighted_error']:.2e}" if row["tensor"] in errors else "",
            row["reason"],
        ]
        for row in tensors
    ]
    header = ["tensor", "shape", "format", "bytes", "bits", "weighted error", "reason"]
    return f"<details><summary>{len(rows)} tensors</summary>{_table(header, rows, 'Tensors')}</details>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], label: str, wrap: bool = False) -> str:
    """A table that scrolls by itself where it is wider than the page; wrap: its last column breaks instead."""
    head = f"<tr>{''.join(f'<th scope=col>{escape(h)}</th>' for h in header)}</tr>" if any(header) else ""
    last = '<td class="text wrap">' if wrap else "<td>"
    body = "".join(
        "<tr>"
        + "".join(f"{last if i + 1 == len(row) else '<td>'}{escape(c)}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>{head}{body}</table></div>'
    )
