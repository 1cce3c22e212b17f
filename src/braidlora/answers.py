"""How answers are compared as text."""

from __future__ import annotations

from unicodedata import normalize


def plain_answer(text: str) -> str:
    """An answer as predictions and references are compared: accents composed (NFC), runs of whitespace one space."""
    return " ".join(normalize("NFC", text).split())
