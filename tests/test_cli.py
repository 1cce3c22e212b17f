"""The command line itself: help without torch, overrides, exit codes."""

import json
import subprocess
import sys

import pytest

from braidlora.cli import main, parse_overrides
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
    assert "flan8" in listed
    assert main(["recipes", "flan8"]) == 0
    assert "tasks:" in capsys.readouterr().out


def test_recipes_takes_no_overrides(capsys):
    assert main(["recipes", "--seed=1"]) == 2
    assert "takes no overrides" in capsys.readouterr().err
