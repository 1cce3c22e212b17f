"""Clients that draw A each for itself: the whole command, for every rule that allows it."""

import json

import pytest

from braidlora.federated import RULE_NAMES
from braidlora.federated.simulation.driver import federate


@pytest.mark.parametrize("rule", [name for name in RULE_NAMES if name not in ("ffa-lora", "rolora")])
def test_rounds_count(make_config, tmp_path, rule):
    config = make_config(rule=rule, client_init="independent", local={"steps": 1})
    federate(config, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["counted"] for line in lines] == [True, True]
    assert all("failed" not in line and len(line["clients"]) == 3 for line in lines)
