from __future__ import annotations

import json
from typing import Any

import pytest
from task_helpers import byte_level_tokenizer

from helpers.data import data_path


@pytest.fixture(scope="session")
def stories_tokenizer():
    """SentencePiece BPE with byte fallback, 512 tokens, `<s>` as BOS and EOS."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data_path("models", "stories260K"))


@pytest.fixture
def byte_tokenizer():
    return byte_level_tokenizer()


@pytest.fixture
def rows_file(tmp_path):
    """Write rows as JSON Lines and give the path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
