"""Nothing from data, files or recipes reaches a terminal as a command to it."""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from braidlora.terminal import BOLD, PLAIN, Formatter, json_printable, printable, say, say_styled

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt\u2066\r\x08\x7f"
SOURCE = Path(__file__).parent.parent / "src" / "braidlora"


def unsafe(text):
    return [
        c
        for c in text
        if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2066\u2028"
    ]


def run(*words):
    child = subprocess.run(
        [sys.executable, "-m", "braidlora", *map(str, words)], capture_output=True, check=False, timeout=250
    )
    return child.returncode, child.stdout.decode(), child.stderr.decode()


def test_what_a_terminal_would_obey_is_written_out():
    assert printable("\x1b[31m") == "\\x1b[31m"
    assert printable("a\rb\x9b\u202e\ud800\U000e0041") == "a\\rb\\x9b\\u202e\\ud800\\U000e0041"
    for text in ("é 红 می\u200cشود 👩\u200d👩", "a\n\tb\u3000c\u00a0d"):
        assert printable(text) == text
    assert unsafe(printable(EVIL)) == []


def test_json_stays_the_same_json():
    value = {EVIL: [EVIL, "\U000e0041", "\u2028"]}
    text = json_printable(json.dumps(value, ensure_ascii=False))
    assert unsafe(text) == []
    assert json.loads(text) == value


def test_only_the_styles_of_preview_pass(capsys):
    say_styled(f"{BOLD}{printable(EVIL)}{PLAIN} \x1b[5m")
    shown = capsys.readouterr().out
    assert shown.startswith(BOLD)
    assert unsafe(shown.replace(BOLD, "").replace(PLAIN, "")) == []
    say(EVIL, 3)
    assert unsafe(capsys.readouterr().out) == []
    record = logging.LogRecord("braidlora", logging.WARNING, "", 0, "%s", (EVIL,), None)
    assert unsafe(Formatter().format(record)) == []


def test_only_the_terminal_module_prints():
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    allowed = ("terminal.py", "cli/_common.py")
    assert [place for place in found if not place.startswith(allowed)] == [], "use terminal.say"


@pytest.mark.parametrize("as_json", [False, True])
def test_hostile_columns_labels_and_paths_on_the_command_line(tmp_path, as_json):
    folder = tmp_path / "dir\x1b[2J"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({f"col{EVIL}": "x"}) + "\n")
    recipe = tmp_path / "recipe.yaml"
    base = {"name": "a", "train": str(rows)}
    recipe.write_text(json.dumps({"tasks": [base]}))
    code, out, err = run("preview", recipe, *["--json"] * as_json)
    assert (code, unsafe(out), unsafe(err)) == (3, [], [])
    assert "\\x1b]0;owned" in err
    rows.write_text(
        "".join(json.dumps({"text": f"t{EVIL}{i}", "label": f"l{EVIL}{i % 2}"}) + "\n" for i in range(6))
    )
    recipe.write_text(json.dumps({"tasks": [{**base, "kind": "classify"}]}))
    code, out, err = run("preview", recipe, *["--json"] * as_json)
    assert (code, unsafe(out), unsafe(err)) == (0, [], [])
    if as_json:
        assert json.loads(out)["tasks"]["a"]["labels"] == [f"l{EVIL}0", f"l{EVIL}1"]
    code, out, err = run("preview", recipe, f"--x{EVIL}.y=1")
    assert (code, unsafe(out), unsafe(err)) == (2, [], [])
