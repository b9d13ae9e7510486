"""What holds where nothing is said. Nothing heavy is imported here."""

from typing import Any

DEFAULT_PROFILE = "balanced-4bit"

BUDGET_PROFILE = "budget"
"""The profile of a conversion that is asked for a size or a divergence, where none is named."""

CACHE_BYTES = 10 << 30
"""What the cache may take."""


def default_profile(options: dict[str, Any]) -> str:
    """The profile of a conversion with these options, where none is named."""
    targets = (options.get(key) for key in ("target_size", "target_bpw", "target_kld"))
    return DEFAULT_PROFILE if all(target is None for target in targets) else BUDGET_PROFILE
