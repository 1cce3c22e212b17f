"""Loading without `import braidlora`: PEFT ends in a KeyError, and the folder says what is missing."""

import json
import re
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftModel
from tiny import CONFIGS, PREFIXES, adapted, config, llama
from transformers import LlamaForSequenceClassification

from braidlora.adapters._card import add_loading_section

BOTH = pytest.mark.parametrize("tuner", CONFIGS)


def code_of(card):
    """The Python code of the card's first block."""
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )


@BOTH
def test_the_cards_code_loads_what_fails_without_its_first_line(tuner, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    folder = tmp_path / "adapter"
    adapted(tuner, base, task_type="CAUSAL_LM").save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: peft" in card
    assert card.count("## How to load") == 1
    kind = PREFIXES[tuner].upper().rstrip("_")
    assert f"`KeyError: '{kind}'`" in card

    code = code_of(card).replace("PATH_OF_THIS_FOLDER", str(folder))
    loaded = run(code + "\nprint(type(model).__name__, model.peft_type)")
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == ["PeftModelForCausalLM", f"PeftType.{kind}"]

    without = run("\n".join(line for line in code.splitlines() if "import braidlora" not in line))
    assert without.returncode == 1
    assert without.stderr.rstrip().endswith(f"KeyError: '{kind}'"), "the docs quote this"
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert "`import braidlora` before PEFT loads" in saved["requires"]


@BOTH
def test_the_note_has_no_meaning_when_read(tuner, tmp_path, recwarn):
    made = config(tuner, fan_in_fan_out=False)
    made.save_pretrained(tmp_path)
    recwarn.clear()
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == made.to_dict()
    assert not [w for w in recwarn if "requires" in str(w.message)]


@BOTH
def test_the_section_is_written_once_and_a_users_card_is_kept(tuner, tmp_path):
    model = adapted(tuner, llama(LlamaForSequenceClassification, num_labels=2), task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in first
    assert 'from_pretrained("BASE_MODEL", num_labels=NUMBER_OF_LABELS)' in first
    (tmp_path / "README.md").write_text(first + "\nMine.\n")
    model.save_pretrained(tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert again.count("## How to load") == 1
    assert again.rstrip().endswith("Mine.")


@BOTH
def test_folders_that_peft_writes_no_card_into(tuner, tmp_path):
    model = adapted(tuner, name="mine")
    model.save_pretrained(tmp_path)
    assert "## How to load" in (tmp_path / "mine" / "README.md").read_text()
    native = llama()
    native.add_adapter(config(tuner))
    native.save_pretrained(tmp_path / "native")
    assert "import braidlora" in (tmp_path / "native" / "README.md").read_text()
    assert type(PeftModel.from_pretrained(llama(), tmp_path / "native")) is PeftModel


@pytest.mark.parametrize(
    "card", ["", "# Title\n\ntext\n", "---\nlicense: mit\n---\n# Title\n", "---\nnot closed\n"]
)
def test_any_card_keeps_its_text(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    add_loading_section(tmp_path, {"peft_type": "BRAIDLORA"})
    written = (tmp_path / "README.md").read_text()
    section = written[written.index("\n<!--") :]
    head = "---\nlicense: mit\n---\n" if "license" in card else ""
    assert written.startswith(head)
    assert section.endswith(card[len(head) :])
