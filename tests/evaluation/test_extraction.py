"""Answers from free text: every rule, and what models write when they do not keep to the form."""

import math

import pytest

from braidlora.errors import DataError
from braidlora.evaluation.extraction import answers_match, extract, reference_answer


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "it is not true but false", "true"),
        ("boolq", "falsetrue", "false"),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "solution3 or solution1", "solution1"),
        ("social_i_qa", "answer3answer1", "answer3"),
        ("social_i_qa", "answer5", "answer5"),
        ("ARC-Easy", "\n\nthe correct answer is answer4.", "answer4"),
        ("ARC-Challenge", "answer6, no: answer1", "answer1"),
        ("openbookqa", "answer12", "answer1"),
        ("hellaswag", "the correct answer is ending4", "ending4"),
        ("hellaswag", "ending5 ending2", "ending2"),
        ("winogrande", "option2 is it", "option2"),
        ("AQuA", "so the answer is (D)", "D"),
        ("AQuA", "The answer is B", "B"),
        ("mathqa", "All of them: C", "A"),
        ("number", "so 3 + 4 = 7.", "7."),
        ("number", "costs $1,234.50 in all", "1234.50"),
        ("number", "from 10 down to -3", "-3"),
        ("number", "x = 5-2", "-2"),
        ("number", "1.2.3", "3"),
        ("none", "  as it stands\n", "as it stands"),
        ("none", "", ""),
    ],
)
def test_the_first_choice_or_the_last_number_counts(rule, text, expected):
    assert extract(rule, text) == expected


CHOICE_RULES = [
    "boolq", "piqa", "social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa", "hellaswag", "winogrande",
]  # fmt: skip


@pytest.mark.parametrize("rule", [*CHOICE_RULES, "AQuA", "mathqa", "number"])
@pytest.mark.parametrize("text", ["", " ", "\n\n\n", "</s><unk>", "�� ¿qué?", "i do not know", "### :"])
def test_nothing_found_is_none_and_never_correct(rule, text):
    assert extract(rule, text) is None
    assert not answers_match(rule, None, "7" if rule == "number" else "A")


@pytest.mark.parametrize("rule", CHOICE_RULES)
@pytest.mark.parametrize(
    "text", ["TRUE", "Answer1", "SOLUTION1", "Option1", "answer 1", "answer0", "solution", "ending"]
)
def test_other_spellings_are_no_answer(rule, text):
    assert extract(rule, text) is None


@pytest.mark.parametrize(
    ("text", "reference", "correct"),
    [
        ("576", "576.0", True),
        ("the answer is 1,000,000", "1000000", True),
        ("3.1415", "3.1424", True),
        ("3.1415", "3.1426", False),
        ("about 12%", "12", True),
        ("-5", "5", False),
        ("5.", "5", True),
        ("first 7, then 8", "7", False),
        ("9" * 400, "1", False),
        ("٣", "3", True),
    ],
)
def test_numbers_are_correct_within_a_thousandth(text, reference, correct):
    assert answers_match("number", extract("number", text), reference) is correct


def test_the_last_number_of_a_very_long_text_is_found_quickly():
    assert extract("number", "1." * 200_000 + " 42") == "42"


def test_an_unknown_rule_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"got 'qa'.*winogrande.*number"):
        extract("qa", "x")


@pytest.mark.parametrize(
    ("rule", "reference", "expected"),
    [
        ("boolq", "the correct answer is false", "false"),
        ("boolq", "false", "false"),
        ("number", "576.0", "576.0"),
        ("number", "24 * 24 = 576 tiles. The answer is 576.", "576."),
        ("AQuA", " C ", "C"),
        ("mathqa", "(E)", "E"),
        ("none", " yes ", "yes"),
    ],
)
def test_references_are_read_by_the_same_rule(rule, reference, expected):
    assert reference_answer(rule, reference, "task, row 0") == expected
    assert math.isfinite(float(expected)) if rule == "number" else True


@pytest.mark.parametrize(
    ("rule", "reference"), [("boolq", "yes"), ("number", "none"), ("AQuA", "The answer is (D).")]
)
def test_a_reference_without_an_answer_is_a_data_error_with_the_remedy(rule, reference):
    with pytest.raises(DataError, match=r"boolq_small, test row 3: the reference .*columns\.answer"):
        reference_answer(rule, reference, "boolq_small, test row 3")
