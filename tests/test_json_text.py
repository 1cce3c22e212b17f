"""JSON from files that anybody may have written: what cannot be read is a ValueError, at the command line exit 5."""

import json

import pytest

from braidlora.cli import main
from braidlora.errors import CheckpointError
from braidlora.json_text import loads
from braidlora.runs._files import parse_json

UNREADABLE = {
    "deep": b"[" * 100_000,
    "digits": b'{"r": ' + b"9" * 6000 + b"}",
    "cut": b'{"r": ',
    "no text": b"\xff\xfe\x00[",
    "empty": b"",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read(name, tmp_path):
    with pytest.raises(ValueError, match=r"."):
        loads(UNREADABLE[name])
    with pytest.raises(CheckpointError, match=r"file\.json: not readable as JSON"):
        parse_json(tmp_path / "file.json", UNREADABLE[name])


def test_what_can():
    assert loads('{"a": [1, 2.5, null]}') == loads(b'{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}


KINDS = {
    **UNREADABLE,
    "unknown": json.dumps({"peft_type": "NOPE"}).encode(),
    "list": b'{"peft_type": ["LORA"]}',
}


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_configuration_that_cannot_be_read(name, tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"not looked at")
    (folder / "adapter_config.json").write_bytes(KINDS[name])
    calls = (
        ["evaluate", str(folder), "--recipe", "demo"],
        ["export", str(folder), "--output", str(tmp_path / "out")],
        ["analyze", str(folder), "--output", str(tmp_path / "analysis")],
    )
    for call in calls:
        assert main(call) == 5, call
        assert "adapter_config.json: " in capsys.readouterr().err
