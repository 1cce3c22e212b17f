"""Where the rows of a part of a task are, and how its file is read."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from braidlora.config._section import Count, Section

# Formats of files by the suffix of their names.
SUFFIXES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".xlsx": "xlsx",
    ".parquet": "parquet",
}


def _checked_delimiter(given: str) -> str:
    delimiter = {"tab": "\t", "\\t": "\t"}.get(given, given)
    if len(delimiter) != 1 or delimiter in '"\r\n' or delimiter.isalnum():
        raise ValueError(
            f"got {given!r}; expected one character that is not a letter, digit or quote, or tab"
        )
    return delimiter


def _checked_encoding(name: str) -> str:
    try:
        "".encode(name)
        return codecs.lookup(name).name
    except (LookupError, UnicodeError, ValueError):
        raise ValueError(f"got {name!r}; expected an encoding such as utf-8, cp1252 or utf-16") from None


class DataSource(Section):
    """A source of rows. A plain string in a recipe is short for `{source: STRING}`."""

    source: str = Field(
        "",
        description="a json/jsonl/csv/xlsx/parquet file, a folder saved by `datasets`, a hub dataset, `data:KEY` of "
        "the catalog, or `generated:NAME`; a relative path starts at the working directory, or else at "
        "$BRAIDLORA_DATA. Default: that of the task's `data`; for `validation` and `test`, the rows that `split` holds "
        "out",
    )
    format: Literal["json", "jsonl", "csv", "xlsx", "parquet", "folder", "hub"] | None = None
    delimiter: Annotated[str, AfterValidator(_checked_delimiter)] | None = Field(
        None, description="csv: between two cells, one character or `tab`; default: detected"
    )
    encoding: Annotated[str, AfterValidator(_checked_encoding)] | None = Field(
        None, description="csv, json: e.g. cp1252 or utf-16; default: detected"
    )
    sheet: str | None = Field(None, description="xlsx: its name; default: the first one")
    subset: str | None = Field(None, description="configuration name of a hub dataset")
    split: str | None = Field(None, description="split of a hub dataset or saved folder")
    where: dict[str, Any] = Field(
        {}, description="keep rows in which each column equals its value, or one of a list of values"
    )
    limit: Count | None = Field(
        None,
        description="keep this many rows, drawn with `seed` (train, before `split` holds rows out) or `split.seed` "
        "(validation, test)",
    )


def _source(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


Source = Annotated[DataSource, BeforeValidator(_source)]
