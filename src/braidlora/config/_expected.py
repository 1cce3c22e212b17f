"""What a value should have been, in plain words instead of pydantic's."""

from __future__ import annotations

import re

_START = "Input should be "
_WORDS = (
    (r"a valid integer(, (unable to parse string as an integer|got a number with a .* part))?", "a whole number"),
    (r"a valid number(, unable to parse string as a number)?", "a number"),
    (r"a valid boolean(, unable to interpret input)?", "true or false"),
    (r"a valid string", "a text"),
    (r"a valid list", "a list"),
    (r"a valid dictionary", "a section with keys"),
    (r"greater than or equal to", "at least"),
    (r"less than or equal to", "at most"),
    (r"greater than", "more than"),
)  # fmt: skip


def expected(message: str) -> str:
    """A message of pydantic for a recipe: `Input should be a valid integer, …` is `expected a whole number`."""
    if not message.startswith(_START):
        return message[0].lower() + message[1:]
    text = message.removeprefix(_START)
    for theirs, ours in _WORDS:
        text = re.sub(theirs, ours, text)
    if text == "a text, or a text":  # an item of a list that may also be one text
        text = "a text, or a list of texts"
    return f"expected {text}"
