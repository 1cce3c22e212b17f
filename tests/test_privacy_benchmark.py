"""benchmarks/privacy.py: what it measures of the noise, and that it can be stopped and continued."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import privacy

    monkeypatch.setattr(privacy, "RESULTS", tmp_path / "privacy.json")
    return privacy


def test_the_error_is_linear_in_the_noise_of_one_factor_and_more_in_that_of_both(benchmark, tmp_path):
    draw = torch.Generator().manual_seed(0)
    factors = {
        "lora_A": torch.randn(2, 30, generator=draw),
        "lora_B": 0.1 * torch.randn(20, 2, generator=draw),
    }
    path = tmp_path / "adapter.safetensors"
    save_file({f"l.{layer}.{name}.weight": t.clone() for layer in "qv" for name, t in factors.items()}, path)
    for rule in ("fed-alora", "fedsa-lora", "ffa-lora"):
        found = benchmark.error_of_noise(path, rule, 0.1, 0)
        assert [found[str(n)] / found["1"] for n in (2, 4, 8)] == pytest.approx([2, 4, 8], rel=1e-4)
    both = benchmark.error_of_noise(path, "fedit", 0.1, 0)
    assert both["8"] / both["1"] > 10
    assert benchmark.error_of_noise(path, "fedit", 0.0, 0) is None


def test_it_continues_where_it_was_stopped(benchmark, monkeypatch, capsys):
    made = []

    def cell(rule, epsilon, seed, options):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append((rule, epsilon, seed))
        found = None if epsilon == float("inf") else epsilon
        return {"rule": rule, "epsilon": found, "seed": seed, "score": 50.0 + seed, "cpu_seconds": 1.0}

    monkeypatch.setattr(benchmark, "cell", cell)
    monkeypatch.setattr(sys, "argv", ["privacy.py", "--seeds=0,1"])
    started = []
    for count in (5, 10):
        with pytest.raises(KeyboardInterrupt):
            benchmark.main()
        assert len(json.loads(benchmark.RESULTS.read_text())["cells"]) == count
        started += made
        made.clear()
    assert len(set(started)) == 10, "finished cells are not trained again"
    monkeypatch.setattr(sys, "argv", ["privacy.py", "--show"])
    benchmark.main()
    assert "shared B" in capsys.readouterr().out
