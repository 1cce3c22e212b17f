"""`--client-gpus`: how many clients train at the same time on a GPU, which Ray only has to count."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from deployments import braidlora, environment, recipe

SCRIPT = Path(__file__).parent / "recorded_simulation.py"


@pytest.mark.parametrize(("share", "at_once"), [(0.5, 2), (1, 1)])
def test_clients_share_a_gpu_by_their_fractions(tmp_path, share, at_once):
    path = tmp_path / "recipe.yaml"
    given = recipe(rounds=1, local={"steps": 40})
    path.write_text(yaml.safe_dump({**given, "output": str(tmp_path / "run")}))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), str(share)],
        capture_output=True, text=True, timeout=280, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    jobs = [one.read_text().split() for one in tmp_path.glob("job-*")]
    assert len({pid for pid, *_ in jobs}) == at_once
    assert {gpu for _, gpu, *_ in jobs} == {"0"}, "Ray gave each of them the GPU"
    spans = [(float(begin), float(end)) for *_, begin, end in jobs]
    overlaps = [min(a[1], b[1]) > max(a[0], b[0]) for a, b in combinations(spans, 2)]
    assert any(overlaps) is (at_once > 1)


def test_no_room_for_a_client(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(rounds=1)))
    words = ("federate", path, "--engine", "flower-sim", f"--output={tmp_path / 'run'}")
    done = braidlora(
        *words, "--client-cpus", 1, "--client-gpus", 0.5, check=False, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 2
    assert "a client takes 1 CPUs and 0.5 GPUs" in done.stderr
    assert "and 0 GPUs; lower them" in done.stderr
    assert "Traceback" not in done.stderr
    done = braidlora(*words, "--client-gpus", 1.5, check=False)
    assert done.returncode == 2
    assert (
        "--client-gpus 1.5: expected 0 to 1, as a client trains on one GPU or on a share of one"
        in done.stderr
    )
