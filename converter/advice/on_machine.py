"""What the report of a conversion says of the machine that its profile was chosen for."""

from bitwright.converter.advice.recommendation import Candidate, Recommendation
from bitwright.converter.report.data import OnMachine


def on_machine(advice: Recommendation, candidate: Candidate) -> OnMachine:
    """candidate: one of the recommendation whose decode speed is stated."""
    speed = candidate.decode
    if speed is None:
        raise ValueError("a candidate without a speed of decoding")
    return OnMachine(
        hardware=advice.machine.name,
        runtime=candidate.runtime,
        context=advice.context,
        batch=advice.batch,
        kv=candidate.kv,
        total_bytes=candidate.total_bytes,
        memory=advice.machine.memory,
        longest_context=candidate.longest_context,
        low=speed.low,
        high=speed.high,
        is_class=speed.is_class,
        basis=speed.basis,
        shares=dict(candidate.shares),
        reason=advice.reason,
    )
