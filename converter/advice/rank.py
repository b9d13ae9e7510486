"""Which candidate is the best, and why."""

from collections.abc import Sequence

from bitwright.converter.advice.recommendation import Candidate, Speed
from bitwright.converter.advice.request import Request
from bitwright.converter.job.defaults import DEFAULT_PROFILE
from bitwright.profiles.sizes import size_text

# Speeds nearer than this are told apart by no prediction.
_NEARLY = 0.9


def speed_of(candidate: Candidate, request: Request) -> Speed | None:
    """The one that counts: of prompts where these alone are asked for."""
    return candidate.prefill if request.phase == "prefill" else candidate.decode


def _rate(candidate: Candidate, request: Request) -> float:
    """Tokens a second as predicted, at the lower end where no range of known coverage stands behind it; 0 where no
    speed is stated."""
    speed = speed_of(candidate, request)
    if speed is None:
        return 0.0
    if request.phase == "prefill":
        return speed.middle
    return speed.low if speed.coverage is None else request.batch / candidate.step_seconds


def ranked(candidates: Sequence[Candidate], request: Request) -> list[Candidate]:
    """The best first, then what fits before what does not; what can be recommended before what has to be measured
    first; the faster; the smaller."""
    best = best_of(candidates, request)

    def key(candidate: Candidate) -> tuple[bool, bool, int, float, int]:
        return (
            candidate is not best,
            not candidate.fits,
            candidate.standing,
            -_rate(candidate, request),
            candidate.total_bytes,
        )

    return sorted(candidates, key=key)


def best_of(candidates: Sequence[Candidate], request: Request) -> Candidate | None:
    """What fits, satisfies what was asked, and is as fast as any, or nearly: among those the one that is known to
    diverge least; where nothing is known the default, and then the one with more bits. What has to be measured first
    only where nothing else fits."""
    fitting = [candidate for candidate in candidates if candidate.fits and satisfies(candidate, request)]
    choice = next((found for standing in (0, 1) if (found := [c for c in fitting if c.standing == standing])), [])
    if not choice:
        return None
    fastest = max(_rate(candidate, request) for candidate in choice)
    near = [candidate for candidate in choice if _rate(candidate, request) >= _NEARLY * fastest]

    def key(candidate: Candidate) -> tuple[bool, float, bool, float]:
        kld = candidate.kld
        return kld is None, kld or 0.0, candidate.profile != DEFAULT_PROFILE, -candidate.bits_per_weight

    return min(near, key=key)


def satisfies(candidate: Candidate, request: Request) -> bool:
    """The speed that was asked for lies below the range, and the divergence is known and small enough."""
    speed = speed_of(candidate, request)
    if request.target_speed is not None and (speed is None or speed.low < request.target_speed):
        return False
    if request.max_kld is not None:
        return candidate.kld is not None and candidate.kld <= request.max_kld
    return True


def reason_of(order: Sequence[Candidate], best: Candidate | None, request: Request) -> str:
    """One sentence: why this one, or what is in the way."""
    if best is None:
        return _obstacle(order, request)
    speed, others = speed_of(best, request), [c for c in order if c.fits and c is not best and c.standing == 0]
    what = "as fast as any that fits" if others else "the only one that fits"
    if request.target_speed is not None or request.max_kld is not None:
        what = "as fast as any that satisfies what was asked"
    if best.standing:
        what = "nothing larger fits, and below four bits a weight the quality has to be measured first:"
        return f"{what} {best.quality.source}"
    limit = "memory" if best.limit == "memory" else "arithmetic"
    moved = sum(row.n_bytes for row in best.bottlenecks)
    text = f"{what} at {request.context} tokens: a step reads {size_text(moved)} and is bound by {limit}"
    if speed is None:
        text = f"{what}; no speed is stated for this device"
    if best.quality.kld is None:
        text += "; its quality has not been measured"
    return text


def _obstacle(order: Sequence[Candidate], request: Request) -> str:
    if not order:
        return "no profile runs there: see what was left out"
    fitting = [candidate for candidate in order if candidate.fits]
    if not fitting:
        smallest = min(order, key=lambda candidate: candidate.total_bytes)
        longest = max(order, key=lambda candidate: candidate.longest_context)
        text = f"nothing fits: the smallest, {smallest.profile}, takes {size_text(smallest.total_bytes)}"
        if longest.longest_context:
            return f"{text}; with --context {longest.longest_context}, {longest.profile} would fit"
        return f"{text}; a machine with more memory, or a smaller model, would do"
    reasons = []
    if request.target_speed is not None:
        fastest = max(fitting, key=lambda c: speed.middle if (speed := speed_of(c, request)) else 0.0)
        speed = speed_of(fastest, request)
        if speed is None or speed.low < request.target_speed:
            reach = (
                "no speed is known"
                if speed is None
                else f"{fastest.profile} reaches {speed.low:.0f} to {speed.high:.0f}"
            )
            reasons.append(f"{request.target_speed:g} tokens/s is out of reach: {reach}")
    if request.max_kld is not None:
        known = [candidate for candidate in fitting if candidate.kld is not None]
        if len(known) < len(fitting):
            unknown = next(c for c in fitting if c.kld is None)
            reasons.append(f"the divergence of {unknown.profile} is not measured: {unknown.quality.source}")
        elif known:
            least = min(known, key=lambda candidate: candidate.kld or 0.0)
            reasons.append(f"the least divergence is {least.kld:.3g}, of {least.profile}")
    return "; ".join(reasons) or "nothing satisfies both goals at once"
