"""The encoding of a text file, found from its bytes, and its lines. No torch here."""

from __future__ import annotations

import codecs
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from braidlora.errors import DataError

_BLOCK = 1 << 20  # bytes
_SAMPLE = 1 << 18  # bytes of lines with other than ASCII characters, from which an encoding is guessed
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is the beginning of it
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MULTIBYTE = re.compile(rb"[\xc3-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
_FOREIGN = 0.3  # most letters of a Western text are ASCII
_SYMBOL_IN_WORD = re.compile(r"[^\W\d_][\xa1-\xb3\xb5-\xb6\xb8-\xbf\xd7\xf7][^\W\d_]")
_CLOSE = 0.02  # of charset-normalizer's measure of disorder
_COHERENT, _CLEARER = 0.2, 0.1  # of its measure of how much a text looks like a language


def find_encoding(path: Path) -> str:
    """The encoding of a text file, by Python's name of it.

    A byte order mark decides; otherwise UTF-16 is recognized by its zero bytes, and UTF-8 by being valid. Of the old
    8-bit encodings the Western European one of Windows (a superset of Latin-1) is preferred where it fits.

    Raises:
        DataError: it is none of these, and what else it could be is unclear.
    """
    status = path.stat()
    return _found(path, status.st_size, status.st_mtime_ns)


def json_encoding(path: Path) -> str:
    """The encoding of a JSON file: UTF-8, or UTF-16 or UTF-32 where the first bytes say so."""
    with open(path, "rb") as file:
        start = file.read(4096)
    return _of_start(start) or "utf-8"


@functools.lru_cache(maxsize=256)
def _found(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        start = file.read(4096)
    return _of_start(start) or ("utf-8" if _is_utf8(path) else _guessed(path))


def _of_start(start: bytes) -> str | None:
    return next((name for mark, name in _MARKS if start.startswith(mark)), None) or _utf16(start)


def _utf16(start: bytes) -> str | None:
    """UTF-16 without a mark: every other byte of mostly Latin text is zero."""
    half = len(start) // 2
    if (
        half
        and start[1 : 2 * half : 2].count(0) > 0.4 * half
        and start[0 : 2 * half : 2].count(0) < 0.1 * half
    ):
        return "utf-16-le"
    if (
        half
        and start[0 : 2 * half : 2].count(0) > 0.4 * half
        and start[1 : 2 * half : 2].count(0) < 0.1 * half
    ):
        return "utf-16-be"
    return None


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _guessed(path: Path) -> str:
    sample = b""
    with open(path, "rb") as file:
        start = file.read(_SAMPLE)
        file.seek(0)
        for line in file:
            if _NOT_ASCII.search(line):
                sample += line
            if len(sample) >= _SAMPLE:
                break
    valid = _MULTIBYTE.findall(sample)
    invalid = len(_NOT_ASCII.findall(_MULTIBYTE.sub(b"", sample)))
    if len(valid) > invalid:
        return "utf-8"  # with damage, which is reported for each row
    if _is_western(start + sample):
        return "cp1252"
    from charset_normalizer import from_bytes

    found = [match for match in from_bytes(sample) if "cp1252" not in match.could_be_from_charset]
    best = min((match.chaos for match in found), default=0.0)
    close = sorted(
        (match for match in found if match.chaos <= best + _CLOSE), key=lambda match: -match.coherence
    )
    if len(close) == 1 or (close and close[0].coherence >= max(_COHERENT, close[1].coherence + _CLEARER)):
        return codecs.lookup(close[0].encoding).name
    names = ", ".join(codecs.lookup(match.encoding).name for match in close[:4])
    could = f"It could be {names}. " if names else ""
    raise DataError(
        f"{path}: is not UTF-8 text, and its encoding is unclear. {could}Name it (`encoding: …` next to the source), "
        "or save the file as UTF-8."
    )


def _is_western(sample: bytes) -> bool:
    """Whether bytes are a Western European text: few letters that are not ASCII, and no symbol inside a word.

    charset-normalizer needs more text than a few lines to tell that a lone ß is not half-width Katakana.
    """
    try:
        text = sample.decode("cp1252")
    except UnicodeDecodeError:
        return False
    letters = [letter for letter in text if letter.isalpha()]
    special = sum(not letter.isascii() for letter in letters)
    return special <= _FOREIGN * len(letters) and not _SYMBOL_IN_WORD.search(text)


def text_lines(path: Path, encoding: str) -> Iterator[str]:
    """The lines of a text file, split at line feeds (or at carriage returns in a file without line feeds).

    In a UTF-8 file, bytes that are not UTF-8 become lone surrogates, so that the row can be reported or skipped.

    Raises:
        DataError: the file is not text in this encoding.
    """
    if encoding == "utf-8":
        yield from _utf8_lines(path)
        return
    number = 0
    try:
        with open(path, encoding=encoding, newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and not line.endswith("\n"):
                    yield from (part + "\n" for part in line.removeprefix("\ufeff").split("\r"))
                else:
                    yield line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeError as error:
        raise DataError(
            f"{path}:{number + 1}: is not text in the encoding {encoding}: {error}. Set `encoding`, or save the file "
            "as UTF-8."
        ) from None


def _utf8_lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        if path.stat().st_size and file.peek(3)[:3] == codecs.BOM_UTF8:
            file.seek(len(codecs.BOM_UTF8))
        first = next(file, b"")
        lines = [first] if first.endswith(b"\n") else [part + b"\n" for part in first.split(b"\r")]
        for line in itertools.chain(lines, file):
            yield line.decode("utf-8", errors="surrogateescape")
