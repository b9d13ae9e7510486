"""Secrets, taken out of what is written down."""

import os
import re

_HIDDEN = "***"
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
# Tokens of the Hub, whatever goes by a word for a secret, credentials in an address, and signatures of one.
_PATTERNS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), f"hf_{_HIDDEN}"),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1 {_HIDDEN}"),
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE), rf"\1{_HIDDEN}@"),
    (
        re.compile(r"([?&][\w-]*(?:signature|credential|token|key|policy)[\w-]*=)[^&\s'\"]+", re.IGNORECASE),
        rf"\1{_HIDDEN}",
    ),
    (
        re.compile(r"\b((?:[\w-]*[_-])?(?:token|password|secret|api[_-]?key)=)[^\s&'\"]+", re.IGNORECASE),
        rf"\1{_HIDDEN}",
    ),
)


def redacted(text: str) -> str:
    """The text without tokens, passwords, and signatures of addresses."""
    for name in _VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= 8:
            text = text.replace(value, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
