"""ROUGE in other scripts: equal texts score 100, halves a half, and English as the rouge-score package has it."""

import random
import string
import unicodedata
import warnings
from types import SimpleNamespace

import pytest
from rouge_score.rouge_scorer import RougeScorer

from braidlora.evaluation._tokens import tokens
from braidlora.evaluation.extraction import answers_match, extract
from braidlora.evaluation.metrics import ROUGE, exact_match, rouge
from braidlora.evaluation.scoring import references

TEXTS = [
    "红色的苹果", "красный дом", "अच्छा दिन है", "مرحبا بالعالم", "สวัสดีชาวโลก", "ខ្ញុំស្រឡាញ់", "안녕 세계",
    "ありがとう コーヒー", "γειά σου", "naïve café", "שלום עולם", "தமிழ் மொழி", "🙂 👍🏽",
    "Straße", "ⅷ ½", "Ａ１ Ｂ２", "می‌شود", "नेपाली १२३",
    "বাংলা", "ພາສາລາວ", "မြန်မာ", "Việt Nam",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_equal_texts_score_100_whatever_their_script_and_normal_form(text):
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        other = unicodedata.normalize(form, text)
        assert rouge("rouge1", other, text) == pytest.approx(100.0)
        assert rouge("rougeL", text, other) == pytest.approx(100.0)
    assert exact_match(unicodedata.normalize("NFD", text), unicodedata.normalize("NFC", text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("红色, 12月!", ["红", "色", "12", "月"]),
        ("Красный дом", ["красный", "дом"]),
        ("अच्छा दिन", ["अच्छा", "दिन"]),  # vowel signs and viramas are part of the word
        ("مَرحبا بالعالم", ["مَرحبا", "بالعالم"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("한국어 텍스트", ["한국어", "텍스트"]),
        ("カフェ3杯", ["カ", "フ", "ェ", "3", "杯"]),
        ("Café—naïve", ["café", "naïve"]),
        ("ΟΔΟΣ οδός", ["οδοσ", "οδόσ"]),
        ("don't U.S.A. 3.5", ["don", "t", "u", "s", "a", "3", "5"]),
        ("ok 🙂👍🏽", ["ok", "🙂", "👍🏽"]),
        ("co\u00adop\u200b \u202eabc", ["coop", "abc"]),
        ("?! —", []),
    ],
)
def test_tokens(text, expected):
    assert tokens(text) == [unicodedata.normalize("NFKC", one) for one in expected]


def test_parts_of_a_text():
    # 2 of 3 characters and 2 of 4
    assert rouge("rouge1", "红色花", "红色苹果") == pytest.approx(400 / 7)
    assert rouge("rougeL", "красный дом", "красный сад") == pytest.approx(50.0)
    assert rouge("rouge2", "我爱北京", "我爱上海") == pytest.approx(100 / 3)


def test_ascii_text_scores_as_the_rouge_score_package_has_it():
    draw = random.Random(0)
    alphabet = (
        string.ascii_letters
        + string.digits
        + string.punctuation
        + " " * 20
        + "\n\t\r\x0b\x0c\x1c\x1f\x7f\x00"
    )
    reference = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for _ in range(300):
        text = "".join(draw.choices(alphabet, k=draw.randrange(60)))
        other = "".join(draw.sample(text, len(text)))
        for name, score in reference.score(text, other).items():
            assert rouge(name, other, text) == rouge(f"{name}_ascii", other, text) == 100 * score.fmeasure
    assert rouge("rouge1_ascii", "café", "caf") == pytest.approx(100.0)
    assert rouge("rougeL_ascii", "红色", "红色") == 0.0


def task(metric, answers):
    rows = [{"instruction": "q", "input": "", "output": answer, "answer": answer} for answer in answers]
    template = SimpleNamespace(answer=lambda answer: answer)  # that of a prompt, which leaves answers alone
    return SimpleNamespace(
        name="t", kind="generate", metric=metric, extract="none", test=rows, template=template
    )


def test_a_reference_that_the_metric_cannot_see_is_warned_of():
    with pytest.warns(
        UserWarning,
        match=r"rougeL_ascii finds no token in 2 of 3 references, the first 'красный'.*Use rougeL,",
    ):
        references(task("rougeL_ascii", ["good", "красный", "红"]))
    with pytest.warns(UserWarning, match=r"rouge1 finds no token in 1 of 2 .*exact_match"):
        references(task("rouge1", ["good", "?!"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for metric in (*(name for name in ROUGE if "ascii" not in name), "exact_match"):
            references(task(metric, ["good", "красный", "红"]))
        references(task("rouge1_ascii", ["good"]))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("答案是４２。", "42"), ("−5", "-5"), ("－３．５", "-3.5"), ("१२३", "123"), ("١٬٢٣٤٫٥", "1234.5"),
        ("１，０００", "1000"), ("x² = 4", "4"), ("10 m²", "10"),
        ("1,234.50", "1234.50"), ("so it is -7", "-7"), ("5.", "5."),
    ],
)  # fmt: skip
def test_numbers_in_other_scripts(text, number):
    assert extract("number", text) == number
    assert answers_match("number", extract("number", text), number)
