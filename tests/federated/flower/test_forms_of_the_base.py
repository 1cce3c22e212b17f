"""Sites with the same base model in another dtype or in 4 bits."""

import json

import pytest
import yaml
from safetensors.torch import load_file

from braidlora.config import dump_config
from braidlora.federated.flower.settings import read_site
from braidlora.federated.flower.site_recipe import site_config
from braidlora.federated.flower.site_status import format_status
from braidlora.federated.flower.status import StatusFile
from braidlora.reporting.federated_sections import federated_sections, read_federation


@pytest.fixture
def mixed(federation, make_config, tmp_path):
    """A federation of `fed-alora` in which site `rev` has its base in 4 bits, and site `up` in bfloat16."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'braidlora[quant]')")
    made = federation(rounds=2, evaluate_every=1)
    for name, settings in {
        "rev": {"quantization": "4bit", "dtype": "bfloat16"},
        "up": {"dtype": "bfloat16"},
    }.items():
        folder = tmp_path / f"folder-{name}"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(dump_config(made.config))
        site = {"name": name, "server": "127.0.0.1:9092", "ca": None, "key": None, **settings}
        (folder / "site.yaml").write_text(yaml.safe_dump(site))
        made.post.answerers[name] = made.site(name, site_config(folder, read_site(folder)))
    return made


def test_sites_with_a_base_in_4_bits_and_in_16_train_together(mixed, tmp_path):
    status = mixed.post.status
    file = StatusFile(tmp_path / "status.json", tmp_path, "job", ["len", "rev", "up"])
    status.welcomed = file.welcomed
    run = mixed.run()
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [set(line["clients"]) for line in lines] == [{"len", "rev", "up"}] * 2
    assert all(one["loss"] > 0 for line in lines for one in line["clients"].values())
    before, after = (load_file(run / "rounds" / f"round-{n}" / "shared.safetensors") for n in (1, 2))
    assert all(not before[name].equal(after[name]) for name in before)

    forms = {"len": ["float32", "none"], "rev": ["bfloat16", "4bit"], "up": ["bfloat16", "none"]}
    partition = json.loads((run / "partition.json").read_text())
    assert {name: list(one["base"].values()) for name, one in partition.items()} == forms
    assert "rev: quantization of the base is 4bit, and none at len" in status.notes
    sites = json.loads((tmp_path / "status.json").read_text())["sites"]
    assert {name: list(one["base"].values()) for name, one in sites.items()} == forms
    [clients, *_] = federated_sections(read_federation(run, "command"))
    text = " ".join(clients.tables[0].notes)
    assert "Base model by client: float32: len; bfloat16 in 4bit: rev; bfloat16: up." in text


def test_status_shows_how_a_site_has_its_base():
    site = {
        "connected": True, "seen": None, "waiting_since": None, "last": "answered", "rounds": 1, "left_out": 0,
        "loss": 1.0, "up": 1, "down": 1,
    }  # fmt: skip
    sites = {
        "a": {**site, "base": {"dtype": "bfloat16", "quantization": "4bit"}},
        "b": {**site, "base": {"dtype": "float32", "quantization": "none"}},
        "c": {**site, "base": None},
    }
    status = {
        "superlink": True, "address": "x", "output": None, "phase": None, "rounds": 1, "counted": 1, "sites": sites,
        "notes": [], "nodes_online": None, "run": {"active": False, "text": "finished"},
    }  # fmt: skip
    text = format_status(status).splitlines()
    assert [("4bit" in line, "float32" in line) for line in text[-3:]] == [
        (True, False),
        (False, True),
        (False, False),
    ]
