"""Advice for people: a table, the best, and what to do next."""

from collections.abc import Iterator

from bitwright.converter.advice.recommendation import Candidate, Machine, Recommendation, Speed
from bitwright.profiles.advice.hardware import GIB
from bitwright.profiles.sizes import size_text

_SHOWN_SHARES = 2


def advice_text(advice: Recommendation) -> str:
    return "\n".join(_lines(advice))


def _lines(advice: Recommendation) -> Iterator[str]:
    sequences = "One sequence" if advice.batch == 1 else f"{advice.batch} sequences"
    yield f"{advice.model} on {machine_text(advice.machine)}."
    yield (
        f"{sequences} at {advice.context} tokens; {size_text(advice.kv_token_bytes)} of keys and values a token in 16"
        f" bits; attention by {_kernel(advice.attention)}."
    )
    if advice.machine.assumed:
        yield "The registry has the largest memory of this chip: name yours with --memory."
    yield ""
    if advice.candidates:
        yield from _table(advice)
        yield ""
    best = advice.best
    if best is not None:
        yield f"best here: {best.profile}, {advice.reason}."
        yield f"  {best.command}"
        if best.run:
            yield f"  and run it with {best.run}"
        yield f"confidence {best.quality.confidence}: {_quality(best)}"
    else:
        yield f"nothing to recommend: {advice.reason}."
    yield from _ranges(advice)
    if advice.left_out:
        yield "left out: " + "; ".join(f"{entry.profile} ({entry.why})" for entry in advice.left_out)
    for note in advice.notes:
        yield f"note: {note}"


def _table(advice: Recommendation) -> Iterator[str]:
    head = ["profile", "for", "file", "with KV", "KV"]
    head += [name for name in ("decode t/s", "prompt t/s") if _has(advice, name)]
    head += ["speed-up", "longest context", "KLD", "a step's time"]
    rows = [head]
    for candidate in advice.candidates:
        row = [
            candidate.profile,
            candidate.runtime,
            size_text(candidate.file_bytes),
            size_text(candidate.total_bytes) + ("" if candidate.fits else " !"),
            candidate.kv,
        ]
        row += [speed_text(candidate.decode)] if _has(advice, "decode t/s") else []
        row += [speed_text(candidate.prefill)] if _has(advice, "prompt t/s") else []
        longest = candidate.longest_context
        is_models = longest == advice.model_context
        row += [
            f"{candidate.speed_up:.2f}x",
            f"{longest} (model)" if is_models else str(longest) if longest else "none",
            candidate.quality.text,
            shares_text(candidate),
        ]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    if any(not candidate.fits for candidate in advice.candidates):
        yield "! does not fit"
    if any(candidate.quality.kind == "predicted" for candidate in advice.candidates):
        yield "* predicted from the sensitivity table"


def _has(advice: Recommendation, column: str) -> bool:
    decode = column == "decode t/s"
    return any((candidate.decode if decode else candidate.prefill) is not None for candidate in advice.candidates)


def _ranges(advice: Recommendation) -> Iterator[str]:
    stated = advice.best or next(iter(advice.candidates), None)
    if stated is None or stated.decode is None:
        return
    speed = stated.decode
    if speed.coverage is not None:
        yield (
            f"range: {speed.coverage * 10:.0f} of 10 measured points lie in such a range ({speed.basis}, each device"
            " predicted from the others)"
        )
    elif speed.is_class:
        yield f"class: {speed.basis}; too few, or too far apart, for a figure"
    else:
        yield f"range: {speed.basis}, no coverage is known"
    if speed.basis != "a speed measured on this device":
        yield f"narrow it: --measured {stated.profile}=TOKENS_PER_SECOND"


def machine_text(machine: Machine) -> str:
    origin = "measured" if machine.measured else "stated"
    memory, bandwidth = machine.memory / GIB, machine.bandwidth / 1e9
    ridge = f", {machine.ridge:.0f} operations a byte to its ridge" if machine.ridge else ""
    return f"{machine.name} ({memory:.1f} GiB usable, {bandwidth:.4g} GB/s {origin}{ridge})"


def speed_text(speed: Speed | None) -> str:
    if speed is None:
        return "-"
    digits = 0 if speed.high >= 10 else 1
    low, high = f"{speed.low:.{digits}f}", f"{speed.high:.{digits}f}"
    text = low if low == high else f"{low}-{high}"
    return f"~{text}" if speed.is_class else text


def shares_text(candidate: Candidate) -> str:
    """The groups that take most of a step."""
    shares = sorted(candidate.shares.items(), key=lambda share: -share[1])[:_SHOWN_SHARES]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares)


def _quality(candidate: Candidate) -> str:
    quality = candidate.quality
    if quality.kld is None:
        return f"its quality is not measured; {quality.source}"
    return f"mean KL divergence {quality.kld:.3g} nats a token, {quality.kind} ({quality.source})"


def _kernel(name: str) -> str:
    return "the standard kernel" if name == "standard" else f"FlashAttention {name[2:]}"
