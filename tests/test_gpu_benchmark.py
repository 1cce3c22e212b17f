"""benchmarks/gpu.py on the CPU: every stage by the code a GPU runs, results row by row, and what cuts it short."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def call(out, *words, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def load():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_default_stages_fit_into_ten_minutes():
    assert sum(stage.limit for stage in load().DEFAULT) <= 600


def test_an_unknown_stage_is_refused_with_the_known_ones(tmp_path):
    done = call(tmp_path, "--stages", "layer,dekode")
    assert done.returncode == 2
    assert (
        "unknown dekode; the stages are environment, tests, layer, decode, step, train, induction,"
        in done.stderr
    )


def test_a_stage_that_runs_out_of_time_keeps_its_rows_and_is_not_complete(tmp_path, monkeypatch):
    gpu = load()
    stage = gpu.Stage("slow_one", 1, "never ends")
    package = tmp_path / "gpu_stages"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "slow_one.py").write_text(
        "import sys, time, pathlib\n"
        "pathlib.Path(sys.argv[sys.argv.index('--out') + 1]).write_text('{\"rows\": [1]}')\n"
        "print('so far', flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "REHEARSAL_LIMIT", 2)
    gpu._run(stage, tmp_path, True)
    [entry] = json.loads((tmp_path / "summary.json").read_text()).values()
    assert entry["state"] == "timeout"
    assert "so far" in entry["output"]
    assert json.loads((tmp_path / "slow_one.json").read_text()) == {"rows": [1]}
    assert gpu._state(tmp_path, "slow_one") == "timeout"


@pytest.mark.slow
def test_the_rehearsal_completes_every_stage_once(tmp_path):
    done = call(tmp_path, "--rehearse", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {entry["state"] for entry in results["summary"].values()} == {"complete"}
    assert results["tests"]["rows"][0]["failed"] == 0
    assert results["tests"]["rows"][0]["passed"] > 50
    assert {row["timing"] for row in results["layer"]["rows"]} == {"eager", "compiled"}
    assert [row["batch"] for row in results["decode"]["rows"]] == [1, 8]
    trained = [row for row in results["step"]["rows"] if "skipped" not in row]
    assert {(row["targets"], row["method"]) for row in trained} == {
        (targets, method) for targets in ("q,o", "all-linear") for method in ("peft_lora", "alora")
    }
    assert results["train"]["rows"][1]["same_bytes"] is True
    again = call(tmp_path, "--rehearse")
    assert again.stdout.count("complete already") == len(results["summary"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [stage.name for stage in load().STAGES if stage.table])
def test_the_rehearsal_of_a_table(tmp_path, name):
    done = call(tmp_path, "--rehearse", "--stages", name, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    if skipped := [row["skipped"] for row in rows if "skipped" in row]:
        pytest.skip(skipped[0])
    assert len(rows) == (11 if name == "parts" else 2)  # its variants of ALoRA are not cut
    assert all(row["mean"]["values"] for row in rows)
    assert (tmp_path / f"{name}-table.json").is_file()
