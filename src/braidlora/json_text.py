"""Read JSON from untrusted files."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """`json.loads` that raises ValueError for everything that it cannot read.

    The standard library raises RecursionError for deeply nested input such as `[[[[…`.

    Raises:
        ValueError: not JSON, not text, nested too deeply, or a number with thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
