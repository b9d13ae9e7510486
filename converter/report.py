"""What a conversion cost and what it bought: plain data for machines, tables for people."""

from collections import Counter, defaultdict
from collections.abc import Mapping

from converter.checkpoint import Checkpoint
from converter.progress import size_text
from formats.registry import get_format
from profiles.assign import scale_of
from profiles.plan import Plan
from profiles.vocabulary import Role

_GROUPS = {
    "embedding": (Role.EMBEDDING,),
    "output": (Role.OUTPUT,),
    "attention": tuple(role for role in Role if role.startswith("attention_")),
    "mlp": tuple(role for role in Role if role.startswith("mlp_")),
    "experts": tuple(role for role in Role if "expert_" in role),
    "norms, routers": (Role.NORM, Role.BIAS, Role.ROPE, Role.ROUTER, Role.SCALE),
    "other parts": (Role.OTHER,),
}

# Mean KL divergence (nats a token) from which on a user will notice, and from which on the model is broken; about what
# llama.cpp's Q3_K_M and IQ2_XXS mixes do to a small model.
NOTICEABLE_KLD = 0.5
SEVERE_KLD = 2.0


def source_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint's tensors as they are stored."""
    return sum(tensor.n_bytes for tensor in checkpoint.tensors.values())


def group_rows(plan: Plan) -> list[dict]:
    """Formats, weights and bytes of each group of tensors."""
    rows = []
    for group, roles in _GROUPS.items():
        members = [planned for planned in plan.tensors if planned.tensor.role in roles]
        if not members:
            continue
        counts: Counter[str] = Counter(planned.format for planned in members)
        n_bytes, n_weights = (
            sum(planned.n_bytes for planned in members),
            sum(planned.tensor.n_weights for planned in members),
        )
        rows.append(
            {
                "group": group,
                "tensors": len(members),
                "formats": dict(counts.most_common()),
                "weights": n_weights,
                "bytes": n_bytes,
                "bits_per_weight": n_bytes * 8 / n_weights,
                "share": n_bytes / plan.n_bytes,
            }
        )
    return rows


def fallback_lines(plan: Plan) -> list[str]:
    """One line for each kind of fallback: what was wanted, what fits, and what that costs."""
    groups: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    for planned in plan.tensors:
        if planned.wanted is not None:
            groups[planned.wanted, planned.format, planned.tensor.n_columns].append(planned.extra_bytes)
    return [
        f"{len(extra)} tensors with rows of {n_columns} cannot be {wanted}: {chosen} instead,"
        f" {'+' if sum(extra) >= 0 else '-'}{size_text(abs(sum(extra)))}"
        for (wanted, chosen, n_columns), extra in groups.items()
    ]


def unscaled_lines(plan: Plan) -> list[str]:
    """One line for each format with second-level scales that some of its tensors go without."""
    without: dict[str, list[Role]] = defaultdict(list)
    for planned in plan.tensors:
        if get_format(planned.format).tensor_scale is not None and scale_of(planned.tensor, planned.format) is None:
            without[planned.format].append(planned.tensor.role)
    return [
        f"{len(roles)} tensors in {name} have the scales of their blocks alone: llama.cpp applies no second-level scale"
        f" to {', '.join(sorted(set(roles)))}"
        for name, roles in without.items()
    ]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A text table: first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def plan_text(plan: Plan, file_bytes: int) -> str:
    """The plan by groups of tensors, with the exact size of the artifact."""
    rows = [
        [
            row["group"],
            " ".join(f"{name}x{n}" for name, n in row["formats"].items()),
            f"{row['weights'] / 1e6:.1f} M",
            size_text(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['share']:.1%}",
        ]
        for row in group_rows(plan)
    ]
    text = table(["group", "formats", "weights", "bytes", "bits/weight", "share"], rows)
    size = f"{file_bytes} bytes ({size_text(file_bytes)}), {plan.bits_per_weight:.3f} bits per weight"
    return "\n".join([text, "", f"{plan.profile}: {size}", *prediction_lines(plan)])


def prediction_lines(plan: Plan) -> list[str]:
    """What was measured promises, and how near the best choice a budget's is; nothing where nothing was measured."""
    if plan.predicted_kld is None:
        return []
    lines = [f"predicted mean KL divergence: {plan.predicted_kld:.4g} nats a token"]
    if plan.spent is not None:
        lines.append(plan.spent.text)
    return lines


def explanation(rows: list[dict]) -> str:
    """Rows of a plan, with the reason of each; what was measured of them, where anything was."""
    measured = any(row["predicted_loss"] is not None for row in rows)
    cells = []
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        loss = "" if row["predicted_loss"] is None else f"{row['predicted_loss']:.2e}"
        numbers = [str(row["bytes"]), f"{row['bits_per_weight']:.2f}", *([loss] if measured else [])]
        cells.append([row["tensor"], shape, row["format"], *numbers, row["reason"]])
    return table(["tensor", "shape", "format", "bytes", "bits", *(["loss"] if measured else []), "reason"], cells)


def figure(value: float | None, form: str) -> str:
    """A measured figure for people, in this format; None stands for one that is not finite."""
    return "not finite" if value is None else format(value, form)


def perplexity_change(quality: Mapping) -> str:
    """By which share the perplexity is another than the source's, for people."""
    perplexity, of_source = quality["perplexity"], quality["source_perplexity"]
    return figure(None if None in (perplexity, of_source) else perplexity / of_source - 1, "+.1%")


def loss_text(quality: Mapping) -> str:
    """The divergence and the perplexity in half a sentence."""
    perplexities = f"perplexity {figure(quality['source_perplexity'], '.2f')} -> {figure(quality['perplexity'], '.2f')}"
    if quality["mean_kld"] is None:
        return (
            f"the predictions diverge: they are not finite in {quality['not_finite']} of {quality['tokens']} places,"
            f" {perplexities}"
        )
    return f"mean KL divergence {quality['mean_kld']:.3f}, {perplexities}"


def loss_degree(quality: Mapping | None) -> str | None:
    """ "noticeable", "broken" or "lost" (no finite divergence); None for a lesser loss, and where nothing was
    measured."""
    if quality is None:
        return None
    kld = quality["mean_kld"]
    if kld is None:
        return "lost"
    return "broken" if kld >= SEVERE_KLD else "noticeable" if kld >= NOTICEABLE_KLD else None


def quality_warning(quality: dict | None) -> str | None:
    """What to tell about a quality loss, and what to do; None when there is nothing to tell."""
    degree = loss_degree(quality)
    if quality is None or degree is None:
        return None
    return (
        f"the quality loss is {degree}: {loss_text(quality)}; a finer profile costs more bytes and loses less:"
        " --profile balanced-4bit, or raise one role: --set 'mlp_down=Q5_K'"
    )


# What a report says of the divergence before it is measured.
PROMISES = {"predicted_kld": "predicted", "target_kld": "asked for"}


def report_text(report: dict, plan: Plan) -> str:
    """The report for people."""
    source, artifact, ratio = report["source"]["bytes"], report["artifact"]["bytes"], report["compression_ratio"]
    lines = [plan_text(plan, artifact), ""]
    lines.append(f"size         {size_text(source)} -> {size_text(artifact)}, {ratio:.2f}x smaller")
    if report["quality"]:
        lines += quality_lines(report["quality"])
        promises = [f"{report[key]:.4g} {what}" for key, what in PROMISES.items() if report[key] is not None]
        if promises:
            lines.append(f"promised     mean KLD {', '.join(promises)}")
    lines += agreement_lines(report["agreement"])
    if report["coherence"]:
        lines.append(coherence_line(report["coherence"]))
    for task, metrics in (report["tasks"] or {"results": {}})["results"].items():
        lines.append(f"{task:<12} " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    decoder = " by gguf" if report["artifact"]["kind"] == "gguf" else ""
    worst = max(report["errors"], key=lambda error: error["weighted_error"])
    lines.append(
        f"verified     {len(report['errors'])} tensors decoded{decoder}; largest weighted error"
        f" {worst['weighted_error']:.4f} ({worst['tensor']}, {worst['format']})"
    )
    if (coverage := report["super_weight_coverage"]) is not None:
        within = f", {coverage['within']} of them within {coverage['tolerance']:.0%}" if coverage["confirmed"] else ""
        lines.append(f"super weights {coverage['confirmed'] or 'none'}{within}")
    if scales := report.get("kv_cache"):
        largest = max(scales, key=lambda scale: scale["absmax"])
        lines.append(
            f"kv cache     FP8, {len(scales)} scales; the largest is {largest['scale']:.4g} ({largest['tensor']})"
        )
    if feedback := report["feedback"]:
        lines.append(f"feedback     {feedback_text(feedback)}")
    lines.append(
        "time         " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report["seconds"].items())
    )
    lines += [f"written      {file['path']}  sha256 {file['sha256']}" for file in report["artifact"]["files"]]
    lines.append(f"report       {report['page']}, {report['path']}")
    return "\n".join(lines)


def feedback_text(feedback: dict) -> str:
    """What error feedback did, for people."""
    if feedback["plain_error"] is None:
        return "for no matrix: nothing could be held out to judge by"
    return (
        f"kept by {feedback['kept']} of {feedback['matrices']} matrices; output error on held-out inputs"
        f" {feedback['plain_error']:.5f} -> {feedback['feedback_error']:.5f} on average"
    )


def error_table(errors: list[dict]) -> str:
    """The error of every tensor for people."""
    rows = [[e["tensor"], e["format"], f"{e['relative_error']:.6f}", f"{e['weighted_error']:.6f}"] for e in errors]
    return table(["tensor", "format", "relative error", "weighted error"], rows)


def quality_lines(quality: dict) -> list[str]:
    """Perplexity, divergence and the words that were found, for people."""
    lines = [
        f"perplexity   {figure(quality['source_perplexity'], '.3f')} -> {figure(quality['perplexity'], '.3f')}",
        f"divergence   mean KLD {figure(quality['mean_kld'], '.4f')}, 99.9 % {figure(quality['kld_99_9'], '.3f')}, same"
        f" top token {quality['top1_agreement']:.1%}  ({quality['tokens']} tokens of {quality['corpus']})",
    ]
    if quality["words"]:
        lines.append(
            f"next word    {quality['source_next_word_accuracy']:.1%} -> {quality['next_word_accuracy']:.1%} of"
            f" {quality['words']} words found"
        )
    return lines


def agreement_lines(agreement: Mapping | None) -> list[str]:
    """The same as a line of a report, none where the runtime was not asked."""
    return [] if agreement is None else [f"runtime      {agreement_text(agreement)}"]


def agreement_text(agreement: Mapping) -> str:
    """What the runtime computes beside our evaluation of the same artifact, and what was not looked at, for people."""
    parts = []
    if agreement["texts"]:
        parts.append(f"{agreement['texts'] - len(agreement['cuts'])} of {agreement['texts']} texts cut alike")
    if agreement["ends"] is not None:
        missing = agreement["ends"]["missing"]
        parts.append(f"no end at {', '.join(missing)}" if missing else "ends where the source does")
    if (logits := agreement["logits"]) is not None:
        parts.append(
            f"runtime agreement: mean KLD {figure(logits['mean_kld'], '.2g')}, same top token"
            f" {logits['top1_agreement']:.1%} over {logits['scored']} of {logits['tokens']} tokens"
        )
    parts += [f"not checked: {what}" for what in agreement["unchecked"]]
    verdict = agreement["verdict"] or "not judged"
    return f"{verdict}: {'; '.join(parts or agreement['reasons'])}  ({agreement['runtime']})"


def coherence_line(coherence: dict) -> str:
    """The guard's finding for people."""
    whole = sum(not row["problems"] for row in coherence["prompts"])
    return (
        f"generation   {coherence['verdict']}: {whole} of {len(coherence['prompts'])} answers hold together; of"
        f" {coherence['greedy_prompts']} continuations {coherence['greedy_agreement']:.0%} equal the source's over"
        f" {coherence['greedy_tokens']} tokens, {coherence['greedy_common_prefix']:.1f} tokens alike on average"
        f"  ({coherence['runtime']})"
    )
