"""scripts/results_evidence.py: the tables of tuning and of single-task LoRAs, from a small result."""

from pathlib import Path

import pytest

RATE = "training.learning_rate"


@pytest.fixture
def draw(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    from results_evidence import evidence

    return evidence


def row(name, losses):
    tuning = [
        {"values": {RATE: rate}, "validation_loss": None if loss is None else {"mean": loss}}
        for rate, loss in losses.items()
    ]
    return {"name": name, "tuning": tuning}


def result(single):
    rows = [{"name": name, "overrides": {RATE: 1e-3}} for name in ("lora", "alora", "uniform-gate")]
    return {
        "tuning": [row("lora", {3e-4: 0.93, 1e-3: 0.858}), row("alora", {3e-4: 0.9, 1e-3: None})],
        "unlearned": {"letters": {"majority": 1.0, "rows": {"lora": 0.0, "alora": 2.0}}},
        "single": single,
        "comparison": {"rows": rows, "seeds": [0, 1]},
        "machines": {"tuning": {"NVIDIA H200": 2}, "single": {}, "main": {"Intel": 4, "AMD": 2}},
    }


def test_the_lowest_loss_is_bold_and_a_diverged_rate_is_a_dash(draw):
    text = draw(result({}))
    assert "| `lora` | 0.930 | **0.858** |" in text
    assert "| `alora` | **0.900** | – |" in text
    assert "Not tuned here: `uniform-gate` 0.001." in text
    assert "LoRAs for one task" not in text
    assert (
        "the tuned runs scored 0.0 to 2.0 and the most frequent answer 1.0, so the table leaves it out"
        in text
    )
    assert "Machines (runs): tuning NVIDIA H200 (2); main AMD (2), Intel (4)." in text


def test_single_task_scores_with_their_mean(draw):
    scores = {"sum": {"mean": 40.0, "std_seeds": 2.0}, "diff": {"mean": 10.0, "std_seeds": None}}
    text = draw(result(scores))
    assert "| sum | diff | mean |" in text
    assert "| 40.0 ± 2.0 | 10.0 | 25.0 |" in text
    assert "2 seeds" in text
