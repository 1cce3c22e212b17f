"""Sites of one federation that compute in different ways: in 4 bits, in bfloat16, and with two processes."""

import json

import pytest
import yaml
from deployments import NAMES, Deployment, braidlora, log, processes_below

WAYS = {
    "mood": {"quantization": "4bit", "dtype": "bfloat16"},
    "rising": {"dtype": "bfloat16"},
    "sum": {"processes": 2, "batch_size": 4},
}


def test_they_train_together_and_status_says_how_each_has_its_base(tmp_path, free_port):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'braidlora[quant]')")
    settings = {"absence": 600, "wait": 900}
    made = Deployment(tmp_path, free_port(), settings=settings, rounds=2, evaluate_every=1)
    for name, way in WAYS.items():
        path = tmp_path / name / "site.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **way}))
    try:
        made.serve()
        made.join()
        made.federate(tmp_path / "run")
        assert [set(line["clients"]) for line in log(tmp_path / "run")] == [set(NAMES)] * 2
        sites = made.status()["sites"]
        assert sites["mood"]["base"] == {"dtype": "bfloat16", "quantization": "4bit"}
        assert sites["rising"]["base"] == {"dtype": "bfloat16", "quantization": "none"}
        assert sites["sum"]["base"] == {"dtype": "float32", "quantization": "none"}
        assert "4bit" in braidlora("site", "status", tmp_path / "server").stdout
        braidlora("federate", made.recipe, f"--output={tmp_path / 'local'}", "--json")
        ours, theirs = (log(tmp_path / run)[0]["clients"]["sum"]["loss"] for run in ("run", "local"))
        assert ours == pytest.approx(theirs, rel=0.1), (
            "60 rows are 7.5 steps of 8: two processes repeat four rows"
        )
        partition = json.loads((tmp_path / "run" / "partition.json").read_text())
        assert partition["mood"]["base"]["quantization"] == "4bit"
    finally:
        made.close()
    assert not processes_below(tmp_path), "something stayed behind"
