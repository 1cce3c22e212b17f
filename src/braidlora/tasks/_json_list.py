"""Stream the values of a JSON list, so that the file need not fit into memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from braidlora.errors import DataError

_BLOCK = 1 << 18  # bytes
_NEAR = 32  # an error this close to the end of the buffer may only mean that the value is incomplete
_SPACE = re.compile(r"[ \t\r\n]*")


def json_list(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, Any]]:
    """The values of the list in a JSON file, each with the line where it starts.

    Bytes that are not UTF-8 become lone surrogates, so that the row can be reported or skipped.

    Raises:
        DataError: the file does not hold a list, or is not valid JSON; the message has the line.
    """
    with open(path, "rb") as file:
        text = _Text(path, file, encoding)
        first = text.peek()
        if first != "[":
            hint = " It looks like JSON Lines: set `format: jsonl`." if first == "{" else ""
            raise DataError(f"{path}:1: expected a list of rows, [{{…}}, {{…}}].{hint}")
        text.advance(1)
        closed = text.peek() == "]"
        while not closed:
            line = text.line
            yield line, text.value()
            mark = text.peek()
            closed = mark == "]"
            if not closed:
                if mark != ",":
                    what = (
                        "expected , or ] after a row" if mark else "the file ends in the middle of the list"
                    )
                    raise DataError(f"{path}:{text.line}: not valid JSON: {what}.")
                text.advance(1)
                text.peek()
        text.advance(1)
        if text.peek():
            raise DataError(f"{path}:{text.line}: not valid JSON: text after the end of the list.")


class _Text:
    """A buffer over a file: `buffer[at:]` has been read but not used; `line` is the line number of `at`."""

    def __init__(self, path: Path, file: BinaryIO, encoding: str) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)(
            errors="surrogateescape" if encoding == "utf-8" else "strict"
        )
        self.json = json.JSONDecoder()
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False

    def advance(self, by: int) -> None:
        self.line += self.buffer.count("\n", self.at, self.at + by)
        self.at += by

    def more(self, size: int) -> None:
        block = self.file.read(size)
        self.ended = not block
        try:
            decoded = self.decoder.decode(block, final=self.ended)
        except UnicodeError as error:
            raise DataError(f"{self.path}: is not text in the encoding given or found: {error}.") from None
        self.buffer = self.buffer[self.at :] + decoded
        self.at = 0

    def peek(self) -> str:
        """The next character that is not whitespace; "" at the end of the file."""
        while True:
            match = _SPACE.match(self.buffer, self.at)
            assert match is not None  # the pattern matches the empty string
            self.advance(match.end() - self.at)
            if self.at < len(self.buffer) or self.ended:
                return self.buffer[self.at : self.at + 1]
            self.more(_BLOCK)

    def value(self) -> Any:
        """The JSON value that starts here."""
        size = _BLOCK
        while True:
            try:
                value, end = self.json.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos + _NEAR > len(self.buffer)
                if self.ended or not unfinished:
                    line = self.line + self.buffer.count("\n", self.at, error.pos)
                    message = error.msg[:1].lower() + error.msg[1:]
                    raise DataError(f"{self.path}:{line}: not valid JSON: {message}.") from None
            except (RecursionError, ValueError) as error:
                raise DataError(f"{self.path}:{self.line}: not readable JSON: {error}.") from None
            else:
                if end < len(self.buffer) or self.ended:  # a number might continue in the next block
                    self.advance(end - self.at)
                    return value
            self.more(size)
            size *= 2
