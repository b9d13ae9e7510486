"""What a conversion cost and what it bought: lines and tables for people."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from bitwright.calibration.evaluation.quality import QualityReport
from bitwright.calibration.text.corpus import EMBEDDED
from bitwright.converter.artifact.tensor_errors import TensorError
from bitwright.converter.gguf.bounds import Bounds
from bitwright.converter.report.data import Agreement, Coherence, Feedback, Report, TunedLayers
from bitwright.converter.report.run_lines import local_lines
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.planning.summary import tensor_groups
from bitwright.profiles.sizes import size_text

WIDTH = 80
"""Columns of a terminal that tables and sentences fit; paths, commands and names that people copy are not broken."""
# The space between a number and its unit.
_UNIT = re.compile(r"(?<=\d) (?=%|(?:[KMGT]?i?B|s|min|h)\b)")


def wrapped(line: str, indent: str | None = None) -> str:
    """The line in lines of WIDTH columns at most, the later ones indented: as the first one is, and two more."""
    start = line[: len(line) - len(line.lstrip())]
    later = start + "  " if indent is None else indent
    together = _UNIT.sub("\N{NO-BREAK SPACE}", line)  # which textwrap takes for no place to break
    filled = textwrap.fill(together, WIDTH, subsequent_indent=later, break_long_words=False, break_on_hyphens=False)
    return filled.replace("\N{NO-BREAK SPACE}", " ")


def labelled(label: str, text: str) -> str:
    """A line of a report: a label, and what is said, which goes on below itself."""
    return below_label(f"{label:<12} {text}")


def below_label(line: str) -> str:
    """A line that begins with a label, in lines that go on below what is said."""
    return wrapped(line, " " * 13)


def table(header: list[str], rows: list[list[str]], wide: int | None = None) -> str:
    """A text table: first column to the left, the others to the right. wide: the column whose words, to the left, go on
    in further lines where the table would be wider than WIDTH."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    if wide is not None:
        wide %= len(header)
        others = sum(widths) - widths[wide] + 2 * (len(widths) - 1)
        longest = max(len(word) for row in [header, *rows] for word in [*row[wide].split(), ""])
        widths[wide] = max(min(widths[wide], WIDTH - others), longest)

    def line(cells: list[str]) -> str:
        columns = enumerate(zip(cells, widths, strict=True))
        return "  ".join(c.ljust(w) if i in (0, wide) else c.rjust(w) for i, (c, w) in columns).rstrip()

    lines = [line(header), line(["-" * width for width in widths])]
    for row in rows:
        if wide is None:
            lines.append(line(row))
            continue
        parts = textwrap.wrap(row[wide], widths[wide], break_long_words=False, break_on_hyphens=False) or [""]
        blank = [""] * len(row)
        for part, others_of_row in zip(parts, [row, *[blank] * (len(parts) - 1)], strict=True):
            lines.append(line([*others_of_row[:wide], part, *others_of_row[wide + 1 :]]))
    return "\n".join(lines)


def table_of_two(header: list[str], rows: list[list[str]], remarks: list[str]) -> str:
    """A table with a remark below each row."""
    head, rule, *lines = table(header, rows).split("\n")
    below = [wrapped(f"    {remark}", "    ") for remark in remarks]
    return "\n".join([head, rule, *(part for pair in zip(lines, below, strict=True) for part in pair)])


def plan_text(plan: Plan, file_bytes: int) -> str:
    """The plan by groups of tensors, with the exact size of the artifact."""
    rows = [
        [
            group.group,
            " ".join(f"{name}x{n}" for name, n in group.formats.items()),
            f"{group.weights / 1e6:.1f} M",
            size_text(group.bytes),
            f"{group.bits_per_weight:.2f}",
            f"{group.share:.1%}",
        ]
        for group in tensor_groups(plan)
    ]
    text = table(["group", "formats", "weights", "bytes", "bits/weight", "share"], rows, wide=1)
    size = f"{file_bytes} bytes ({size_text(file_bytes)}), {plan.bits_per_weight:.3f} bits per weight"
    return "\n".join([text, "", f"{plan.profile}: {size}", *map(wrapped, prediction_lines(plan))])


def bounds_text(bounds: Bounds, profile: str) -> str:
    """What is known of a plan before anything is measured."""
    rows = [
        ("smallest", f"{size_text(bounds.smallest_bytes)}, {bounds.smallest_bits:.2f} bits per weight"),
        ("largest", f"{size_text(bounds.largest_bytes)}, {bounds.largest_bits:.2f} bits per weight"),
        ("missing", " and ".join(bounds.missing)),
    ]
    if bounds.asked_bytes is not None:
        rows.insert(0, ("asked for", size_text(bounds.asked_bytes)))
    lines = [wrapped(f"{profile} chooses every format by what it costs this model, which is not measured yet:")]
    lines += [labelled(label, text) for label, text in rows]
    lines += ["A conversion measures it on its own. To see the plan first, measure with", f"  {bounds.command}"]
    return "\n".join([*lines, "and plan with these options, too:", f"  {bounds.options}"])


def prediction_lines(plan: Plan) -> list[str]:
    """What was measured promises, and how near the best choice a budget's is; nothing where nothing was measured."""
    if plan.predicted_kld is None:
        return []
    lines = [f"predicted mean KL divergence: {plan.predicted_kld:.4g} nats a token"]
    if plan.spent is not None:
        lines.append(plan.spent.text)
    return lines


def explanation(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a plan, with the reason of each; what was measured of them, where anything was."""
    measured = any(row["predicted_loss"] is not None for row in rows)
    cells, reasons = [], []
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        loss = "" if row["predicted_loss"] is None else f"{row['predicted_loss']:.2e}"
        numbers = [str(row["bytes"]), f"{row['bits_per_weight']:.2f}", *([loss] if measured else [])]
        cells.append([row["tensor"], shape, row["format"], *numbers])
        reasons.append(row["reason"])
    return table_of_two(["tensor", "shape", "format", "bytes", "bits", *(["loss"] if measured else [])], cells, reasons)


def figure(value: float | None, form: str) -> str:
    """A measured figure for people, in this format; None stands for one that is not finite."""
    return "not finite" if value is None else format(value, form)


def perplexity_change(quality: QualityReport) -> str:
    """By which share the perplexity is another than the source's, for people."""
    perplexity, of_source = quality.perplexity, quality.source_perplexity
    return figure(None if perplexity is None or of_source is None else perplexity / of_source - 1, "+.1%")


def figures_text(quality: QualityReport) -> str:
    """What a grade rests on, in half a line."""
    return (
        f"KLD {figure(quality.mean_kld, '.4f')}, same top token {quality.top1_agreement:.1%},"
        f" perplexity {perplexity_change(quality)}"
    )


def loss_text(quality: QualityReport) -> str:
    """The divergence and the perplexity in half a sentence."""
    perplexities = f"perplexity {figure(quality.source_perplexity, '.2f')} -> {figure(quality.perplexity, '.2f')}"
    if quality.mean_kld is None:
        return (
            f"the predictions diverge: they are not finite in {quality.not_finite} of {quality.tokens} places,"
            f" {perplexities}"
        )
    return f"mean KL divergence {quality.mean_kld:.3f}, {perplexities}"


def report_text(report: Report, plan: Plan, verdict: str) -> str:
    """The report for people. verdict: what is said first."""
    source, artifact = report.source.bytes, report.artifact.bytes
    lines = [f"size         {size_text(source)} -> {size_text(artifact)}, {report.compression_ratio:.2f}x smaller"]
    if report.quality is not None:
        lines += quality_lines(report.quality)
        if report.promises:
            promises = (f"{kld:.4g} {what}" for what, kld in report.promises.items())
            lines.append(f"promised     mean KLD {', '.join(promises)}")
    lines += agreement_lines(report.agreement)
    if report.coherence is not None:
        lines.append(coherence_line(report.coherence))
    for task, metrics in report.tasks.results.items() if report.tasks is not None else ():
        lines.append(f"{task:<12} " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    decoder, worst = " by gguf" if report.artifact.kind == "gguf" else "", report.largest_error
    lines.append(
        f"verified     {len(report.errors)} tensors decoded{decoder}; largest weighted error"
        f" {worst.weighted_error:.4f} ({worst.tensor}, {worst.format})"
    )
    if (coverage := report.super_weight_coverage) is not None:
        within = f", {coverage.within} of them within {coverage.tolerance:.0%}" if coverage.confirmed else ""
        lines.append(f"super weights {coverage.confirmed or 'none'}{within}")
    if scales := report.kv_cache:
        largest = max(scales, key=lambda scale: scale.absmax)
        lines.append(f"kv cache     FP8, {len(scales)} scales; the largest is {largest.scale:.4g} ({largest.tensor})")
    if report.feedback is not None:
        lines.append(f"feedback     {feedback_text(report.feedback)}")
    if tuning := report.tuning:
        lines.append(f"tuning       {tuning_text(tuning)}")
    lines.append("time         " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items()))
    places = labelled_lines("written", [f"{file.path}\n{'':13}sha256 {file.sha256}" for file in report.artifact.files])
    places += labelled_lines("report", [f"{report.page}", f"{report.path}"])
    places += labelled_lines("run it", local_lines(report.artifact, report.artifact.location))
    return "\n".join([wrapped(verdict), "", plan_text(plan, artifact), "", *map(below_label, lines), *places])


def labelled_lines(label: str, lines: Sequence[str]) -> list[str]:
    """Lines of which the first has a label."""
    return [f"{label if i == 0 else '':<12} {line}" for i, line in enumerate(lines)]


def ladder_text(reports: Sequence[Report]) -> str:
    """A line for each artifact of a ladder, the largest first."""
    rows = []
    for report in sorted(reports, key=lambda report: -report.artifact.bytes):
        quality = report.quality
        measured = ["", "", ""]
        if quality is not None:
            kld, perplexity = figure(quality.mean_kld, ".4f"), figure(quality.perplexity, ".2f")
            measured = [kld, perplexity, f"{quality.top1_agreement:.1%}"]
        size, bits = size_text(report.artifact.bytes), f"{report.bits_per_weight:.2f}"
        rows.append([size, bits, *measured, report.verdict or "not measured", report.artifact.location.name])
    return table(["size", "bits", "mean KLD", "perplexity", "top-1", "verdict", "artifact"], rows, wide=-1)


def feedback_text(feedback: Feedback) -> str:
    """What error feedback did, for people."""
    if feedback.plain_error is None:
        return "for no matrix: nothing could be held out to judge by"
    return (
        f"kept by {feedback.kept} of {feedback.matrices} matrices; output error on held-out inputs"
        f" {feedback.plain_error:.5f} -> {feedback.feedback_error:.5f} on average"
    )


def tuning_text(tuning: TunedLayers) -> str:
    """What tuning did, for people."""
    left = "" if tuning.ratio is None else f"; {tuning.ratio:.3f} of their output error on held-out samples is left"
    return f"kept by {tuning.kept} of {tuning.layers} layers, of {tuning.tensors} tensors{left}"


def error_table(errors: Sequence[TensorError]) -> str:
    """The error of every tensor for people."""
    rows = [[e.tensor, e.format, f"{e.relative_error:.6f}", f"{e.weighted_error:.6f}"] for e in errors]
    return table(["tensor", "format", "relative error", "weighted error"], rows)


def corpus_text(name: str) -> str:
    """What a reader knows the corpus as."""
    return "the built-in text" if name == EMBEDDED else name


def quality_lines(quality: QualityReport) -> list[str]:
    """Perplexity, divergence and the words that were found, for people."""
    computed = "" if quality.device in (None, "cpu") else f", in {quality.dtype} on {quality.device}"
    lines = [
        f"perplexity   {figure(quality.source_perplexity, '.3f')} -> {figure(quality.perplexity, '.3f')}",
        f"divergence   mean KLD {figure(quality.mean_kld, '.4f')}, 99.9 % {figure(quality.kld_99_9, '.3f')}, same"
        f" top token {quality.top1_agreement:.1%}"
        f"  ({quality.tokens} tokens of {corpus_text(quality.corpus)}{computed})",
    ]
    if quality.words:
        lines.append(
            f"next word    {quality.source_next_word_accuracy:.1%} -> {quality.next_word_accuracy:.1%} of"
            f" {quality.words} words found"
        )
    return lines


def cache_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """How the divergence grows with the text where keys and values were kept in a format; nothing otherwise."""
    if "kv" not in evaluation:
        return []
    lines = [f"keys and values in {evaluation['kv']}; mean KLD after so many tokens:"]
    for span in evaluation["by_position"]:
        kld = "not finite" if span["mean_kld"] is None else f"{span['mean_kld']:.4f}"
        lines.append(f"  {span['first'] + 1} to {span['last'] + 1}: {kld}")
    return lines


def agreement_lines(agreement: Agreement | None) -> list[str]:
    """The same as a line of a report, none where the runtime was not asked."""
    return [] if agreement is None else [f"runtime      {agreement_text(agreement)}"]


def agreement_text(agreement: Agreement) -> str:
    """What the runtime computes beside our evaluation of the same artifact, and what was not looked at, for people."""
    parts = []
    if agreement.texts:
        parts.append(f"{agreement.texts - len(agreement.cuts)} of {agreement.texts} texts cut alike")
    if agreement.ends is not None:
        missing = agreement.ends.missing
        parts.append(f"no end at {', '.join(missing)}" if missing else "ends where the source does")
    if (logits := agreement.logits) is not None:
        parts.append(
            f"runtime agreement: mean KLD {figure(logits.mean_kld, '.2g')}, same top token"
            f" {logits.top1_agreement:.1%} over {logits.scored} of {logits.tokens} tokens"
        )
    parts += [f"not checked: {what}" for what in agreement.unchecked]
    verdict = agreement.verdict or "not judged"
    return f"{verdict}: {'; '.join(parts or agreement.reasons)}  ({agreement.runtime})"


def coherence_line(coherence: Coherence) -> str:
    """The guard's finding for people."""
    shortened = [coherence.runtime_note[key] for key in ("shortened", "source") if key in coherence.runtime_note]
    return (
        f"generation   {coherence.verdict}: {coherence.whole} of {len(coherence.prompts)} answers hold together; of"
        f" {coherence.greedy_prompts} continuations {coherence.greedy_agreement:.0%} equal the source's over"
        f" {coherence.greedy_tokens} tokens, {coherence.greedy_common_prefix:.1f} tokens alike on average"
        f"  ({'; '.join((coherence.runtime, *shortened))})"
    )
