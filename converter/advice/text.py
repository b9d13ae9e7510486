"""Advice for people: a table, the best, and what to do next."""

from collections.abc import Iterator

from bitwright.converter.advice.recommendation import Candidate, Machine, Recommendation, Speed
from bitwright.converter.report.text import table_of_two, wrapped
from bitwright.profiles.advice.hardware import GIB
from bitwright.profiles.sizes import size_text

_SHOWN_SHARES = 2


def advice_text(advice: Recommendation) -> str:
    return "\n".join(_lines(advice))


def _lines(advice: Recommendation) -> Iterator[str]:
    sequences = "One sequence" if advice.batch == 1 else f"{advice.batch} sequences"
    yield wrapped(f"{advice.model} on {machine_text(advice.machine)}.")
    yield wrapped(
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
        yield wrapped(f"best here: {best.profile}, {advice.reason}.")
        yield f"  {best.command}"
        if best.run:
            yield f"  and run it with {best.run}"
        yield wrapped(f"confidence {best.quality.confidence}: {_quality(best)}")
    else:
        yield wrapped(f"nothing to recommend: {advice.reason}.")
    yield from map(wrapped, _ranges(advice))
    if advice.left_out:
        yield wrapped("left out: " + "; ".join(f"{entry.profile} ({entry.why})" for entry in advice.left_out))
    for note in advice.notes:
        yield wrapped(f"note: {note}")


def _table(advice: Recommendation) -> Iterator[str]:
    """Two lines a profile: what it takes and gives, and what stands behind that."""
    speeds = [name for name in ("decode t/s", "prompt t/s") if _has(advice, name)]
    rows, remarks = [], []
    for candidate in advice.candidates:
        row = [candidate.profile, size_text(candidate.file_bytes)]
        row.append(size_text(candidate.total_bytes) + (" !" if not candidate.fits else ""))
        row += [speed_text(candidate.decode)] if _has(advice, "decode t/s") else []
        row += [speed_text(candidate.prefill)] if _has(advice, "prompt t/s") else []
        rows.append([*row, candidate.quality.text])
        remarks.append(_remark(candidate, advice.model_context))
    yield table_of_two(["profile", "file", "with KV", *speeds, "KLD"], rows, remarks)
    if any(not candidate.fits for candidate in advice.candidates):
        yield "! does not fit"
    if any(candidate.quality.kind == "predicted" for candidate in advice.candidates):
        yield "* predicted from the sensitivity table"
    if any(candidate.quality.kind == "published" for candidate in advice.candidates):
        yield "+ measured by those who published it"


def _remark(candidate: Candidate, model_context: int | None) -> str:
    longest = candidate.longest_context
    measured = candidate.cache_quality
    with_kv = f" (KLD {measured.kld:.3g} with it)" if measured is not None and measured.is_own else ""
    context = f"up to {longest} tokens{' (the model)' if longest == model_context else ''}"
    return (
        f"{candidate.runtime}, KV in {candidate.kv}{with_kv}, {context if longest else 'no context fits'},"
        f" {candidate.speed_up:.2f}x as fast as 16 bits; a step's time: {shares_text(candidate)}"
    )


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
    name = machine.name if machine.gpus == 1 else f"{machine.gpus} x {machine.name}"
    origin += "" if machine.gpus == 1 else " each"
    instructions = f", {' '.join(machine.instructions)}" if machine.instructions else ""
    return f"{name} ({memory:.1f} GiB usable, {bandwidth:.4g} GB/s {origin}{ridge}{instructions})"


def speed_text(speed: Speed | None) -> str:
    if speed is None:
        return "-"
    digits = 0 if speed.high >= 10 else 1
    low, high = _number(speed.low, digits), _number(speed.high, digits)
    text = low if low == high else f"{low}-{high}"
    return f"~{text}" if speed.is_class else text


def _number(value: float, digits: int) -> str:
    """In thousands or millions where it is long."""
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if value >= 100_000 and value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.{digits}f}"


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
