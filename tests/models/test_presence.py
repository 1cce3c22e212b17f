"""What is not there is named at once: before torch is imported, and before the hub is asked for weights."""

import json
import subprocess
import sys

import pytest

from braidlora.config import ModelSection
from braidlora.errors import ConfigError
from braidlora.models import presence
from braidlora.models.location import base_source
from braidlora.models.presence import refuse_missing, refuse_missing_base

COMMANDS = {
    "predict nosuch --text x": "nosuch: no such run, adapter or model in {here}",
    "predict runs/nosuch --text x": "runs/nosuch: no such run, adapter or model; there is no folder {here}/runs",
    "predict . --file nosuch.csv": "nosuch.csv: no such file or folder; looked for {here}/nosuch.csv",
    "predict . --text x --base nosuch": "nosuch: no such run, adapter or model",
    "predict . --text x --recipe nosuch.yaml": "nosuch.yaml: no such file in {here}",
    "generate nosuch --prompt x": "nosuch: no such run, adapter or model",
    "generate . --file nosuch.txt": "nosuch.txt: cannot be read",
    "evaluate nosuch": "nosuch: no such run, adapter or model",
    "export nosuch": "nosuch: no such run, adapter or model",
    "analyze nosuch": "nosuch: no such run, adapter or model",
    "analyze study nosuch.yaml": "nosuch.yaml: no such file",
    "serve nosuch": "nosuch: no such run, adapter or model",
    "federate add-client nosuch --name a --tasks b": "nosuch: no such run, adapter or model",
    "init nosuch.csv": "nosuch.csv: no such file or folder",
    "init '*.csv'": "*.csv: no such file. It is a pattern, and patterns are expanded by the shell alone: without "
    "quotes, it stands for a.csv, b.csv. In a recipe, name one file or folder for each part.",
    "train nosuch.yaml": "nosuch.yaml: no such file",
    "train demo --tasks.sum.train.source=nosuch.csv": "nosuch.csv: no such file or folder",
    "compare demo --tasks.sum.test.source=nosuch.csv": "nosuch.csv: no such file or folder",
    "preview nosuch.yaml": "nosuch.yaml: no such file",
    "plan nosuch.yaml": "nosuch.yaml: no such file",
    "federate nosuch.yaml": "nosuch.yaml: no such file",
}
SCRIPT = """
import contextlib, io, json, shlex, sys
from braidlora.cli import main
said = {}
for command in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(shlex.split(command))
    said[command] = [code, err.getvalue(), "torch" in sys.modules]
print(json.dumps(said))
"""


def test_a_missing_path_is_named_before_torch_is_imported(tmp_path, monkeypatch):
    monkeypatch.delenv("BRAIDLORA_DATA", raising=False)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("text,label\nx,y\n")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(list(COMMANDS)), capture_output=True, text=True,
        cwd=tmp_path, check=True,
    )  # fmt: skip
    said = json.loads(done.stdout)
    for command, expected in COMMANDS.items():
        code, message, torch = said[command]
        assert expected.format(here=tmp_path) in message, command
        assert code in (2, 3), command
        assert not torch, command


def test_a_name_of_one_word_is_looked_up(tmp_path, monkeypatch):
    """gpt2 is a model of the hub, a mistyped run is not."""
    monkeypatch.chdir(tmp_path)
    known = {"gpt2"}
    monkeypatch.setattr(presence, "_on_hub", lambda name: name in known)
    refuse_missing("gpt2")
    refuse_missing("owner/anything")  # loading explains what is wrong with it
    assert base_source(ModelSection(path="gpt2")) == "gpt2"
    with pytest.raises(ConfigError, match=r"gtp2: no such run, adapter or model in "):
        refuse_missing("gtp2")
    with pytest.raises(
        ConfigError, match=r"model\.path: no model 'gtp2': there is no such folder .*no model of this"
    ):
        base_source(ModelSection(path="gtp2"))


def test_without_a_network_only_the_cache_counts(monkeypatch):
    presence._on_hub.cache_clear()
    assert not presence._on_hub("no-such-model-anywhere")


def test_a_base_that_is_named_by_a_local_path_must_be_here(tmp_path):
    for path in (str(tmp_path / "gone"), "./gone", "gone/model.gguf", "a/b/c"):
        with pytest.raises(
            ConfigError, match=r"run: was trained on the base model .*Say where it is with --base"
        ):
            refuse_missing_base("run", path, "--base PATH")
    for path in (str(tmp_path), "owner/name", "embedded", "package:some_package/a/model"):
        refuse_missing_base("run", path, "--base PATH")
