"""Files of the catalog that are made from public ones: which rows, in which order, in which columns.

Every function gets the name of the file to make and its inputs by name, and returns its content. The result is always
the same, and the catalog records its sha256.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Inputs = Mapping[str, Path]
_ROWS = Path(__file__).with_name("induction_rows.json")

_BINARY = {"0": "negative", "1": "positive"}
_LABELS = {
    "sst2": _BINARY,
    "sst5": {"0": "very negative", "1": "negative", "2": "neutral", "3": "positive", "4": "very positive"},
    "trec": {
        "0": "description", "1": "entity", "2": "abbreviation", "3": "human", "4": "location", "5": "number",
    },
    "subj": {"0": "subjective", "1": "objective"},
    "cr": _BINARY,
    "mpqa": _BINARY,
}  # fmt: skip
_TEST_ROWS = {"cr": 700, "mpqa": 1000, "subj": 1000}  # of sets without a test part of their own

_INSTRUCTIONS = {
    "active_to_passive": "Rewrite the sentence in the passive voice.",
    "antonyms": "Give a word that means the opposite.",
    "diff": "Subtract the second number from the first.",
    "first_word_letter": "Give the first letter of the word.",
    "larger_animal": "Name the larger of the two animals.",
    "letters_list": "Write the word with a space after every letter.",
    "negation": "Negate the sentence.",
    "num_to_verbal": "Write the number in words.",
    "orthography_starts_with": "List the words of the sentence that start with the given letter.",
    "rhymes": "Give a word that rhymes.",
    "second_word_letter": "Give the second letter of the word.",
    "sentence_similarity": "How similar are the two sentences, from 0 - definitely not to 5 - perfectly?",
    "sentiment": "Is the sentence positive or negative?",
    "singular_to_plural": "Give the plural.",
    "sum": "Add the two numbers.",
    "synonyms": "Give a word of the same meaning.",
    "taxonomy_animal": "List the animals.",
    "translation_en-de": "Translate into German.",
    "translation_en-es": "Translate into Spanish.",
    "translation_en-fr": "Translate into French.",
    "word_in_context": "Does the word have the same meaning in both sentences?",
}


def sentences(name: str, inputs: Inputs) -> bytes:
    """A part of a sentence classification set: `text` and `label`, as JSON Lines.

    Sets with a test part keep it, and their training rows are those whose text is not in it. The others are shuffled
    without repeated rows, and the first rows are the test rows.
    """
    task, part = Path(name).parent.name, Path(name).stem
    sources = [_labeled(path) for path in inputs.values()]
    if task in _TEST_ROWS:
        rows = list(dict.fromkeys(sources[0]))
        random.Random(0).shuffle(rows)
        test = _TEST_ROWS[task]
        rows = rows[:test] if part == "test" else rows[test:]
    elif part == "train":
        in_test = {text for _, text in sources[1]}
        rows = [row for row in sources[0] if row[1] not in in_test]
    else:
        rows = sources[0]
    return _lines({"text": text, "label": _LABELS[task][label]} for label, text in rows)


def _labeled(path: Path) -> list[tuple[str, str]]:
    """Label and text of each line `LABEL TEXT`."""
    content = path.read_bytes().decode("utf-8", errors="replace")  # two of the sets are not UTF-8
    pairs = (line.partition(" ") for line in content.split("\n") if line)
    return [(label, text.strip()) for label, _, text in pairs]


def induction(name: str, inputs: Inputs) -> bytes:
    """A part of an instruction induction task: `instruction`, `input`, `output` and `answers`, as JSON Lines.

    Training and test rows are those that induction_rows.json lists, by their place in the original files: at most 600
    and 100, drawn once.
    """
    task, part = Path(name).parent.name, Path(name).stem
    chosen = json.loads(_ROWS.read_text(encoding="utf-8"))[task][part]
    [path] = inputs.values()
    examples = list(json.loads(path.read_text(encoding="utf-8"))["examples"].values())
    return _lines(_induced(_INSTRUCTIONS[task], examples[index]) for index in chosen)


def _induced(instruction: str, example: Mapping[str, Any]) -> dict[str, Any]:
    given, output = example["input"], example["output"]
    others = example.get("possible_outputs") or [
        word for word in example.get("other_rhymes", ()) if word != given
    ]
    return {
        "instruction": instruction,
        "input": given,
        "output": output,
        "answers": [output, *(one for one in others if one != output)],
    }


def gsm8k(name: str, inputs: Inputs) -> bytes:
    """GSM8K's training problems in the columns of LLM-Adapters, without calculator annotations."""
    [path] = inputs.values()
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        problem = json.loads(line)
        solution, _, number = problem["answer"].rpartition("\n#### ")
        number = number.replace(",", "")
        solution = re.sub(r"<<.*?>>", "", solution)
        rows.append(_solved(problem["question"], f"{solution} The answer is {number}.", str(float(number))))
    return _list(rows)


def mawps(name: str, inputs: Inputs) -> bytes:
    """MAWPS's training problems in the columns of LLM-Adapters, with the equation as the solution."""
    [path] = inputs.values()
    return _list(
        _solved(one["original_text"], f"{one['equation']}. The answer is {one['ans']}.", str(one["ans"]))
        for one in json.loads(path.read_text(encoding="utf-8"))
    )


def _solved(problem: str, solution: str, answer: str) -> dict[str, str]:
    return {"instruction": problem, "input": "", "output": solution, "answer": answer}


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _list(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return json.dumps(list(rows), ensure_ascii=False, indent=1).encode()


BUILDERS: dict[str, Callable[[str, Inputs], bytes]] = {
    "sentences": sentences,
    "induction": induction,
    "gsm8k": gsm8k,
    "mawps": mawps,
}
