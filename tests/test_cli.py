"""The command line itself: help without torch, overrides, exit codes."""

import io
import json
import subprocess
import sys
import warnings

import pytest

from braidlora.cli import main, parse_overrides, parse_words
from braidlora.errors import ConfigError


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "braidlora", *args], capture_output=True, text=True, check=False
    )


def test_torch_free_rooms_import_no_torch():
    rooms = "braidlora, braidlora.config, braidlora.runs, braidlora.errors, braidlora.cli"
    code = f"import sys, {rooms}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("order", ["import braidlora, peft", "import peft, braidlora"])
def test_importing_the_package_registers_its_peft_type_in_either_order(order):
    code = f"{order}; print('BRAIDLORA' in list(peft.PeftType), peft.PEFT_TYPE_TO_CONFIG_MAPPING['BRAIDLORA'].__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "MultiLoraConfig"]


def test_overrides_take_both_forms():
    assert parse_overrides(["--a.b=1", "--c", "2"]) == ["a.b=1", "c=2"]


@pytest.mark.parametrize(
    ("verb", "old", "new"),
    [
        (
            ["compare", "demo"],
            ["--row", "a={r: 1}", "--row=b={r: 2}"],
            ["--variant", "a={r: 1}", "--variant=b={r: 2}"],
        ),
        (["compare", "demo"], ["--references=none"], ["--no-single-task"]),
        (["compare", "demo"], ["--references", "single-task"], ["--single-task"]),
        (["demo"], ["--with-references"], ["--single-task"]),
        (["federate", "fed_demo"], ["--references", "runs/alone"], ["--local-run", "runs/alone"]),
        (["analyze", "runs/one", "--routers"], ["--rows", "8"], ["--rows-per-task", "8"]),
        (["preview", "demo"], ["--rows=1"], ["--rows-per-task=1"]),
        (["export", "runs/one"], ["--rows=1"], ["--rows-per-task=1"]),
    ],
    ids=lambda words: words[0],
)
def test_the_old_name_of_an_option_is_a_hidden_alias(verb, old, new, capsys):
    wanted = parse_words([*verb, *new])
    assert capsys.readouterr().err == ""
    assert parse_words([*verb, *old]) == wanted
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == sum(word.startswith("--") for word in old)
    name = old[0].split("=")[0]
    for note in notes:
        assert note.startswith(f"braidlora {verb[0]}: warning: {name}")
        assert f"is deprecated; use {new[0].split('=')[0]}." in note
    with pytest.raises(SystemExit):
        parse_words([verb[0], "--help"])
    assert f"{name} " not in capsys.readouterr().out


@pytest.mark.parametrize("words", [["a.b=1"], ["--a.b"], ["--a", "--b=1"], ["--"]])
def test_words_that_are_no_overrides_are_refused(words):
    with pytest.raises(ConfigError):
        parse_overrides(words)


def test_a_usage_error_exits_with_2_and_one_message():
    result = run("train", "no_such_recipe")
    assert result.returncode == 2
    assert "no_such_recipe" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_verb_exits_with_2():
    assert run("trian", "x").returncode == 2


def test_recipes_lists_and_prints(capsys):
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["math"].startswith("Arithmetic word problems: ")
    assert listed["paper/math_llama3_8b"].endswith("of arXiv 2509.25414.")
    for name, description in listed.items():
        assert description[0].isupper(), name
        assert "braidlora" not in description, name
    assert main(["recipes", "flan8"]) == 0
    assert "tasks:" in capsys.readouterr().out


def test_recipes_takes_no_overrides(capsys):
    assert main(["recipes", "--seed=1"]) == 2
    assert "takes no overrides" in capsys.readouterr().err


def test_a_warning_is_one_line_without_a_place_in_the_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "input": "b", "output": "c"}\n')
    recipe = tmp_path / "recipe.yaml"
    template = "prompt: {template: '{instruction}'}\nmodel: {path: embedded}\n"
    recipe.write_text(template + "tasks: [{name: t, train: rows.jsonl}]\n")
    shown = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", print_to_stderr)
        assert main(["preview", str(recipe)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "rows have an `input`" in line]
    assert len(lines) == 1
    assert lines[0].startswith("braidlora preview: warning: task t: 1 training rows have an `input`")
    assert warnings.formatwarning is shown


def print_to_stderr(*warning):
    """What Python does outside of pytest, which records warnings instead."""
    sys.stderr.write(warnings.formatwarning(*warning[:4]))


@pytest.mark.parametrize(
    "words",
    [
        ["train", "demo", "--output={}"],
        ["analyze", "{}"],
        ["verify", "{}"],
        ["plan", "{}"],
        ["evaluate", "{}"],
    ],
    ids=lambda words: words[0],
)
def test_a_name_that_no_file_system_takes(words, capsys):
    assert main([word.format("y" * 300) for word in words]) in (2, 5)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "y" * 100 in err


def test_a_terminal_that_does_not_know_a_character(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["preview", "demo"]) == 0
    output.flush()
    assert b"\\u27e6" in output.buffer.getvalue()
