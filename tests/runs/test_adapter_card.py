"""`braidlora.json` as a file: what is written is read, and what a stranger may have written is refused."""

import json
import subprocess
import sys

import pytest

from braidlora.errors import CheckpointError
from braidlora.runs import ADAPTER_CARD, AdapterCard, BaseRecord, TaskCard, quoted, read_adapter_card

BASE = BaseRecord(path="embedded", fingerprint="sha256:" + "a" * 64, dtype="float32", quantization="none")
CLASSES = AdapterCard(
    braidlora="1",
    tasks=[
        TaskCard(name="colour", kind="classify", labels=["red", "grün\n"], indices=[0, 1]),
        TaskCard(name="mood", kind="classify", labels=["red", "low"], indices=[0, 2]),
    ],
    labels=["red", "grün\n", "low"],
    base=BASE,
)
TEXT = AdapterCard(braidlora="1", tasks=[TaskCard(name="sum", kind="generate")], base=None)


@pytest.mark.parametrize("card", [CLASSES, TEXT])
def test_what_is_written_is_read(card, tmp_path):
    card.write(tmp_path)
    assert read_adapter_card(tmp_path) == card
    assert json.loads((tmp_path / ADAPTER_CARD).read_text())["format_version"] == 1
    first = (tmp_path / ADAPTER_CARD).read_bytes()
    card.write(tmp_path)
    assert (tmp_path / ADAPTER_CARD).read_bytes() == first


def test_a_folder_without_one(tmp_path):
    assert read_adapter_card(tmp_path) is None


def test_fields_of_a_later_version_of_the_same_format_are_passed_over(tmp_path):
    value = CLASSES.model_dump(mode="json") | {"license": "{text}"}
    (tmp_path / ADAPTER_CARD).write_text(json.dumps(value))
    assert read_adapter_card(tmp_path) == CLASSES


def changed(**fields):
    return CLASSES.model_dump(mode="json") | fields


def task(**fields):
    return changed(tasks=[CLASSES.tasks[0].model_dump(mode="json") | fields])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            changed(format_version=2),
            "format_version 2; this version of braidlora reads at most 1.*pip install -U",
        ),
        (changed(format_version=0), "format_version"),
        (changed(format_version=True), "format_version"),
        (changed(format_version="1"), "format_version"),
        ([], "the file: "),
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (changed(tasks=None), "tasks"),
        (changed(labels=["red", "red", "low"]), "two logits have the same label"),
        (changed(labels=None), "needs labels and indices"),
        (changed(labels=["red", "low"]), "do not match those of the logits"),
        (changed(labels=[1, 2, 3]), "labels.0"),
        (task(indices=[1, 0]), "do not match those of the logits"),
        (task(indices=[0, 7]), "do not match those of the logits"),
        (task(indices=[0, -1]), "do not match those of the logits"),
        (task(indices=[0]), "do not match those of the logits"),
        (task(indices=[0.0, 1.0]), "indices"),
        (task(labels=[], indices=[]), "needs labels"),
        (task(kind="generate"), "a generate task has no labels"),
        (task(kind="rank"), "kind"),
        (task(name=""), "name"),
        (task(name="a\u001b[2Jb"), "name"),
        (changed(tasks=[CLASSES.tasks[0].model_dump(mode="json")] * 2), "same name"),
        (changed(base={"path": "x"}), "base.fingerprint"),
        (changed(base={"path": "x", "fingerprint": "\u001b]0;"}), "base.fingerprint"),
        (changed(base={"path": "x\n", "fingerprint": "0" * 16}), "base.path"),
        (b" " * (17 << 20), "larger than 16 MiB"),
    ],
)
def test_what_is_not_valid_is_refused_in_one_line(value, message, tmp_path):
    if isinstance(value, bytes):
        content = value
    else:
        content = (value if isinstance(value, str) else json.dumps(value)).encode()
    (tmp_path / ADAPTER_CARD).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter_card(tmp_path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert caught.value.exit_code == 5


def test_labels_in_messages_are_escaped_and_not_endless():
    assert quoted(["a", "b\x1b\n"]) == r"'a', 'b\x1b\n'"
    assert quoted([str(number) for number in range(30)]).endswith("'19', … (10 more)")


def test_it_is_read_without_torch():
    script = "import sys, braidlora.runs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
