"""Parse JSON of unknown origin."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """`json.loads` that raises ValueError for everything it cannot read.

    The standard library raises RecursionError for deeply nested text such as `[[[[…`.

    Raises:
        ValueError: `text` is not JSON or not UTF-8, is nested too deeply, or has a number with thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
