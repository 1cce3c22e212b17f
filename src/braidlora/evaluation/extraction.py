"""From a model's free text to its answer: the extraction rules of LLM-Adapters' evaluation.

Hu et al., "LLM-Adapters" (arXiv 2304.01933); the shared-B paper (arXiv 2509.25414) scores with the same rules.
For choices and letters the first match counts, for arithmetic the last number. Matching is case-sensitive.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from braidlora.errors import DataError

NUMBER_TOLERANCE = 0.001
"""An extracted number is correct when it is at most this far from the reference."""

_FIVE_ANSWERS = re.compile("answer1|answer2|answer3|answer4|answer5")
_LETTERS = re.compile("A|B|C|D|E")
_FIRST_MATCH: Mapping[str, re.Pattern[str]] = {
    "boolq": re.compile("true|false"),
    "piqa": re.compile("solution1|solution2"),
    "social_i_qa": _FIVE_ANSWERS,
    "ARC-Easy": _FIVE_ANSWERS,
    "ARC-Challenge": _FIVE_ANSWERS,
    "openbookqa": _FIVE_ANSWERS,
    "hellaswag": re.compile("ending1|ending2|ending3|ending4"),
    "winogrande": re.compile("option1|option2"),
    "AQuA": _LETTERS,
    "mathqa": _LETTERS,
}
_NUMBER = re.compile(r"-?\d+\.?\d*")
# Other scripts' minus, comma and point, by their ASCII forms; `\d` and `float` know digits of every script.
_MARKS = str.maketrans("\u2212\uff0d\uff0c\u066c\uff0e\u066b", "--,,..")
_LONE_LETTER = re.compile(r"\(?([A-E])\)?\.?")


def extract(rule: str, text: str) -> str | None:
    """The answer in `text` under `rule`, or None if there is none.

    Args:
        rule: a name of the recipe's `extract` key: the eight commonsense tasks (`boolq`, `piqa`, `social_i_qa`,
            `ARC-Easy`, `ARC-Challenge`, `openbookqa`, `hellaswag`, `winogrande`), `AQuA`, `mathqa`, `number` (all
            other arithmetic: commas are dropped, the last number counts), or `none` (the stripped text itself).
        text: what the model wrote after the prompt.

    Raises:
        ValueError: `rule` is not one of these.
    """
    if rule == "none":
        return text.strip()
    if rule == "number":
        numbers = _NUMBER.findall(text.translate(_MARKS).replace(",", ""))
        return _ascii_digits(numbers[-1]) if numbers else None
    if rule not in _FIRST_MATCH:
        known = ", ".join(["none", *_FIRST_MATCH, "number"])
        raise ValueError(f"extract: got {rule!r}; expected one of {known}")
    match = _FIRST_MATCH[rule].search(text)
    return match.group() if match else None


def closed_answers(rule: str) -> list[str] | None:
    """Everything that a rule can extract; None for `none` and `number`, whose answers are no closed set."""
    return _FIRST_MATCH[rule].pattern.split("|") if rule in _FIRST_MATCH else None


def reference_answer(rule: str, reference: str, place: str) -> str:
    """The answer in a row's reference, as in `find_reference`.

    Args:
        rule: as in `extract`.
        reference: the row's `answer`, or its `output` if the data has no answer column.
        place: task and row, for messages.

    Raises:
        DataError: the reference contains no answer under this rule.
    """
    answer = find_reference(rule, reference)
    if answer is None:
        raise DataError(
            f"{place}: the reference {_short(reference)} contains no answer under `extract: {rule}`. "
            "Name the column with the bare answer in the task's `columns.answer`, or choose another `extract`."
        )
    return answer


def find_reference(rule: str, reference: str) -> str | None:
    """The answer in a row's reference, under the same rule as the predictions; None if it contains none.

    A reference may be the bare answer (`true`) or a sentence (`the correct answer is true`). Letters must be alone
    (`B`, `(B)`): the first capital of a rationale would be a wrong reference.

    Args:
        rule: as in `extract`.
        reference: the row's `answer`, or its `output` if the data has no answer column.
    """
    if rule in ("AQuA", "mathqa"):
        letter = _LONE_LETTER.fullmatch(reference.strip())
        return letter.group(1) if letter else None
    return extract(rule, reference)


def answers_match(rule: str, extracted: str | None, reference: str) -> bool:
    """Whether an extracted answer is correct. None (nothing found) never is; numbers match within 0.001."""
    if extracted is None:
        return False
    if rule == "number":
        return abs(float(extracted) - float(reference)) <= NUMBER_TOLERANCE
    return extracted == reference


def _ascii_digits(number: str) -> str:
    return "".join(str(unicodedata.decimal(one)) if one.isdecimal() else one for one in number)


def _short(text: str, longest: int = 60) -> str:
    return repr(text if len(text) <= longest else text[:longest] + "…")
