"""How errors show what came."""

from __future__ import annotations


def short(value: object, text: str | None = None) -> str:
    """A value in an error, or what is said of it: not longer than a line."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    if text is None:
        try:
            text = repr(value)
        except Exception:  # a stranger's, or Python's where a number in it has too many digits
            text = f"a {type(value).__name__} that has no repr"
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."
