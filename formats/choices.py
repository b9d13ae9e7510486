"""What a caller may choose of an encoder; apart from the codecs, which bring numpy and numba."""

from typing import Literal

Effort = Literal["best", "fast"]
FeedbackLevel = Literal["quick", "best"]
"""How long codes are chosen together, see formats/feedback/choose.py."""
