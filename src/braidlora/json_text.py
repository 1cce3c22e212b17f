"""JSON from files that anybody may have written."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """`json.loads`, for which everything that cannot be read is a ValueError.

    The standard library raises RecursionError for `[[[[…`, which nobody who reads a damaged file expects.

    Raises:
        ValueError: it is no JSON, no text, nested too deeply, or has a number with thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
