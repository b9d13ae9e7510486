"""Advice as one page for people: a file without network or script, for light and dark, wide and narrow."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bitwright.converter.advice.plans import Source
from bitwright.converter.advice.recommendation import Candidate, Recommendation
from bitwright.converter.advice.request import Request
from bitwright.converter.advice.stage import advise
from bitwright.converter.advice.text import machine_text, speed_text
from bitwright.converter.report.svg import Curve, Figure, curves_chart, roofline_chart, stacked_bars
from bitwright.converter.report.templates import templates
from bitwright.converter.report.text import figure
from bitwright.formats.files.whole import whole_file
from bitwright.profiles.sizes import size_text

# Of the curves and the bars; what the model was not made for is left out.
_CURVES = (512, 2048, 8192, 32768, 131072)
_BARS = (1, 4096, 32768)
_SHOWN = 5
_TEMPLATES = templates("bitwright.converter.report", {"fmt": figure, "size": size_text, "speed": speed_text})


def write_page(path: Path, request: Request, advice: Recommendation) -> None:
    """request: that the advice answers. Raises ConvertError for a path that cannot be written."""
    content = advice_page(request, advice)
    with whole_file(path, "page") as file:
        file.write(content.encode())


def advice_page(request: Request, advice: Recommendation) -> str:
    """The page. It asks for the same advice at other contexts."""
    source = Source.open(request.model, request.from_quantized, request.base)
    longest = min(advice.model_context or _CURVES[-1], _CURVES[-1])
    curve = {longest, *(context for context in _CURVES if context < longest)}
    contexts = sorted(curve | {context for context in _BARS if context <= longest})
    # A speed that was measured at one context says nothing of another's cache.
    others = {
        context: advise(replace(request, context=context, measured=(), target_speed=None, max_kld=None), source)
        for context in contexts
    }
    return _TEMPLATES.get_template("advice.html.j2").render(
        title=f"{advice.model} on {advice.machine.name}",
        mark="",
        advice=advice,
        machine=machine_text(advice.machine),
        figures=_figures(advice, others, curve),
    )


def _figures(advice: Recommendation, others: dict[int, Recommendation], curve: set[int]) -> list[Figure]:
    """others: the same advice by context; curve: those that the curves are drawn through."""
    shown = [candidate for candidate in advice.candidates if candidate.fits][:_SHOWN]
    if not shown:
        return []
    best, figures = shown[0], []
    steps = [(context, _of(others[context], best.profile)) for context in _BARS if context in others]
    figures.append(
        stacked_bars(
            f"A step of {best.profile}",
            "Milliseconds of a decode step by group of operators, at several lengths of the text.",
            [
                (f"{context // 1024}K" if context >= 1024 else "start", _parts(step))
                for context, step in steps
                if step is not None
            ],
            text=lambda value: f"{value:.3g} ms",
        )
    )
    over = {context: other for context, other in others.items() if context in curve}
    if len(over) > 1:
        curves = [_curve(candidate, over) for candidate in shown]
        figures.append(
            curves_chart(
                "Tokens a second over the context",
                "Predicted tokens a second of the best profiles, over the length of the text.",
                curves,
                axis="tokens of context",
                notes=["Dashed: few measurements stand behind it."] if any(curve.dashed for curve in curves) else [],
            )
        )
    rate = advice.machine.rates.get("fp16")
    if rate:
        points = [(row.operator, row.intensity) for row in best.bottlenecks if row.operations]
        figures.append(
            roofline_chart(
                f"{best.profile} on the roofline",
                "Operations a second that the device allows, over operations a byte, and a step's operators on it.",
                points,
                advice.machine.bandwidth,
                rate,
                notes=[f"Left of {advice.machine.ridge:.0f} operations a byte memory is the limit."],
            )
        )
    return figures


def _of(advice: Recommendation, profile: str) -> Candidate | None:
    return next((candidate for candidate in advice.candidates if candidate.profile == profile), None)


def _parts(step: Candidate) -> Sequence[tuple[str, float]]:
    """Milliseconds of a step by group."""
    return [(name, share * step.step_seconds * 1e3) for name, share in step.shares.items()]


def _curve(candidate: Candidate, others: dict[int, Recommendation]) -> Curve:
    points = []
    for context, advice in others.items():
        other = _of(advice, candidate.profile)
        if other is not None and other.fits:
            points.append((float(context), advice.batch / other.step_seconds))
    dashed = candidate.decode is not None and candidate.decode.coverage is None
    return Curve(f"{candidate.profile}, {candidate.runtime}", points, dashed)
