"""Tokens of a text in any script, for ROUGE; on ASCII text exactly those of the rouge-score package."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

# Scripts without spaces between words: every character, with its marks, is a token.
_SPACELESS = (
    "Han Hiragana Katakana Bopomofo Yi Tangut Thai Lao Khmer Myanmar Tai_Tham New_Tai_Lue Tai_Le Javanese"
).split()


def tokens(text: str) -> list[str]:
    """Lower-case words of letters, digits and the marks on them; characters in scripts without spaces; emoji.

    Texts that look alike compare equal: composed and decomposed accents, full-width and ordinary letters. Joiners, soft
    hyphens and direction marks are ignored.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    visible = "".join(character for character in folded if unicodedata.category(character) != "Cf")
    return _pattern().findall(visible)


@functools.cache
def _pattern() -> Any:
    import regex

    scripts = "".join(rf"\p{{Script={name}}}" for name in _SPACELESS)
    return regex.compile(
        rf"[[{scripts}]&&\p{{L}}]\p{{M}}*|(?:[[\p{{L}}\p{{N}}]--[{scripts}]]\p{{M}}*)+|\p{{So}}[\p{{M}}\p{{Sk}}]*",
        regex.VERSION1,
    )
