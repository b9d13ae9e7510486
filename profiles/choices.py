"""What a caller may choose of a profile; apart from the profiles, which bring the formats."""

from typing import Literal

Mode = Literal["auto", "off", "raise", "pin", "rescale", "exclude"]
"""What is done about super weights: "auto" takes what measurement shows to help."""

Kept = Literal["keep", "drop"]
"""What becomes of a part of the model that does without."""
