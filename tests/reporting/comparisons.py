"""Comparisons of any shape, with the logs of their runs on disk."""

import json
import math
import random
import statistics
from pathlib import Path

METHODS = ["LoRA", "LoRA, r = 24", "HydraLoRA", "MoE-LoRA", "ALoRA"]
TASKS = ["rising", "falling", "backwards", "count", "odd_one_out", "who", "mood", "sum"]


def statistic(values):
    """As `comparison.json` writes it: mean, standard deviation over seeds (null for one), values."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std_seeds": statistics.stdev(known) if len(known) > 1 else None,
        "values": values,
    }


def environment():
    return {
        "versions": {"python": "3.11.2", "braidlora": "0.1.0", "torch": None},
        "machine": {"system": "Linux", "processor": "a processor", "cpus": 2, "devices": ["cpu"]},
        "threads": 1,
        "date": "2026-01-02T03:04:05+00:00",
    }


def comparison(
    methods=METHODS, tasks=TASKS, seeds=(0, 1, 2), *, references=True, base=True, sweep=None, tuned=False
):
    """Scores at random around a level per task and a gain per method; the intervals are what the gains suggest."""
    draw = random.Random(7)
    level = {task: draw.uniform(20, 75) for task in tasks}
    noise = {(task, seed): draw.gauss(0, 1.5) for task in tasks for seed in seeds}
    rows = []
    for index, label in enumerate(methods):
        scores = {
            task: [level[task] + noise[task, seed] + 2.2 * index + draw.gauss(0, 1.5) for seed in seeds]
            for task in tasks
        }
        rows.append(_row(index, label, scores, list(seeds), rows[0] if rows else None, draw))
        if references:
            rows[-1]["delta_m"] = statistic([draw.uniform(-4, 6) for _ in seeds])
            rows[-1]["delta_m_reason"] = None
        if tuned:
            tried = [{"training.learning_rate": rate} for rate in (0.001, 0.005, 0.02)]
            rows[-1]["tuned"] = tried[1]
            rows[-1]["tuning"] = [
                {"values": values, "validation_loss": statistic([draw.uniform(0.4, 0.6) for _ in seeds])}
                for values in tried
            ]
        if sweep is not None:
            rows[-1]["overrides"] = {"adapter.method": "alora"}
            if index:
                rows[-1]["overrides"][sweep["key"]] = sweep["values"][index - 1]
    return {
        "format": 1,
        "recipe": {"name": "demo", "yaml": "model:\n  path: embedded\nadapter:\n  method: alora\n"},
        "command": "braidlora compare demo --seeds 0,1,2",
        "environment": environment(),
        "tasks": {task: {"metric": "exact_match", "n": 100} for task in tasks},
        "memory": "the process's resident memory (VmHWM)",
        "seeds": list(seeds),
        "baseline": rows[0]["name"],
        "confidence": 0.95,
        "references": {
            "runs": {},
            "scores": {
                task: statistic([level[task] + 3 + draw.gauss(0, 1) for _ in seeds]) for task in tasks
            },
            "reason": None,
        }
        if references
        else {"runs": None, "scores": None, "reason": "--single-task was not given"},
        "base": _column({task: draw.uniform(0, 20) for task in tasks}) if base else None,
        "base_reason": None if base else "a classifier's head is new",
        "majority_reason": None if base else "no training rows",
        "majority": _column({task: draw.uniform(5, 40) for task in tasks}) if base else None,
        "rows": rows,
        "sweep": sweep,
        "verdict": [
            f"{methods[-1]} scores highest.",
            "It is ahead on most tasks, and behind on none.",
        ],
    }


def write_logs(directory: Path, comparison, steps=60, every=5):
    """A `log.jsonl` for every run: losses that fall, each seed and task on its own level."""
    draw = random.Random(3)
    for row in comparison["rows"]:
        for run in row["runs"]:
            (directory / run).mkdir(parents=True)
            lines = []
            for step in range(every, steps + 1, every):
                tasks = {
                    task: 4 * math.exp(-step / 15) + 0.3 + draw.gauss(0, 0.05) for task in comparison["tasks"]
                }
                lines.append(
                    {
                        "step": step,
                        "epoch": step / 30,
                        "loss": statistics.fmean(tasks.values()),
                        "tasks": tasks,
                    }
                )
            (directory / run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _row(index, label, scores, seeds, baseline, draw):
    name = f"method{index}"
    means = [statistics.fmean(column) for column in zip(*scores.values(), strict=True)]
    worst = [min(scores, key=lambda task: scores[task][place]) for place in range(len(seeds))]
    difference = None
    if baseline is not None:
        tasks = {task: _interval(scores[task], baseline["tasks"][task]["values"], 4.0) for task in scores}
        difference = {
            "baseline": baseline["name"],
            **_interval(means, baseline["mean"]["values"], 1.8),
            "values": [mean - other for mean, other in zip(means, baseline["mean"]["values"], strict=True)],
            "tasks": tasks,
        }
    return {
        "name": name,
        "label": label,
        "overrides": {"adapter.method": name, "adapter.r": 8 + index},
        "tuned": None,
        "tuning": [],
        "trainable_parameters": 9_000 + 4_321 * index,
        "seconds": statistic([draw.uniform(10, 14) for _ in seeds]),
        "peak_memory_mib": statistic([draw.uniform(300, 400) for _ in seeds]),
        "seeds": seeds,
        "tasks": {task: statistic(values) for task, values in scores.items()},
        "mean": statistic(means),
        "worst": {
            **statistic([scores[task][place] for place, task in enumerate(worst)]),
            "tasks": worst,
        },
        "delta_m": None,
        "delta_m_reason": "no single-task references were given",
        "difference": difference,
        "difference_reason": None,
        "runs": [f"cells/{name}-seed{seed}" for seed in seeds],
    }


def _interval(values, baseline, half):
    mean = statistics.fmean(value - other for value, other in zip(values, baseline, strict=True))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _column(scores):
    return {"tasks": scores, "mean": statistics.fmean(scores.values())}
