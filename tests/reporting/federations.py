"""A federation of any size, as its files hold it."""

import json
import random
import statistics

from comparisons import environment

STAGES = ("before", "after", "aggregated")


def federation(clients=4, rounds=5, *, labels=("negative", "positive"), scored=True, asked=None):
    draw = random.Random(5)
    names = [f"client-{number:02}" for number in range(1, clients + 1)]
    lines = []
    for number in range(1, rounds + 1):
        taking_part = sorted(draw.sample(names, asked or clients))
        by_client = {}
        for name in names:
            if name in taking_part:
                by_client[name] = {
                    "loss": 3 / number + draw.random(),
                    "rows": 30,
                    "up": 60_000,
                    "down": 50_000,
                }
                if scored:
                    by_client[name] |= {stage: draw.uniform(10, 80) for stage in STAGES}
            elif scored:
                by_client[name] = {"aggregated": draw.uniform(10, 80)}
        means = {stage: _mean([one[stage] for one in by_client.values() if stage in one]) for stage in STAGES}
        sent = {way: len(taking_part) * size for way, size in (("up", 60_000), ("down", 50_000))}
        lines.append({"round": number, "counted": True, "clients": by_client, "bytes": sent, "means": means})
    return {
        "name": "hospitals",
        "command": "braidlora federate hospitals.yaml",
        "recipe": "federation:\n  rule: fed-alora\n",
        "environment": environment(),
        "metrics": _metrics(names, lines, scored),
        "rounds": lines,
        "partition": {name: _rows(labels, draw) for name in names},
    }


def write_federation(directory, federated):
    """The files that `read_federation` reads."""
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(federated["recipe"])
    (directory / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in federated["rounds"]))
    for name in ("environment", "metrics", "partition"):
        (directory / f"{name}.json").write_text(json.dumps(federated[name]))


def _metrics(names, lines, scored):
    last = {
        name: {stage: _last(lines, name, stage) for stage in STAGES} for name in names
    }  # fmt: skip
    spread = {}
    for stage in STAGES:
        scores = {name: one[stage] for name, one in last.items() if one[stage] is not None}
        worst = min(scores, key=scores.get) if scores else None
        spread[stage] = {
            "mean": _mean(list(scores.values())),
            "worst": scores.get(worst),
            "worst_client": worst,
            "std": statistics.pstdev(scores.values()) if scores else None,
            "delta_m": None,
            "delta_m_reason": "no references were given",
        }
    return {
        "rule": "fed-alora",
        "rounds": len(lines),
        "skipped": [],
        "clients": {
            name: {
                "rank": 8, "rows": 30, "rounds": len(lines), "mean": last[name]["aggregated"], **last[name],
                "bytes": {"up": 60_000 * len(lines), "down": 50_000 * len(lines)},
            }
            for name in names
        },
        **spread["aggregated"],
        "before": spread["before"],
        "after": spread["after"],
        "bytes": {way: sum(line["bytes"][way] for line in lines) for way in ("up", "down")},
        "seconds": 12.5,
    }  # fmt: skip


def _last(lines, name, stage):
    return next((c[stage] for line in reversed(lines) if stage in (c := line["clients"].get(name, {}))), None)


def _rows(labels, draw):
    values = {label: draw.randint(0, 30) for label in labels} if labels else None
    rows = sum(values.values()) if values else draw.randint(10, 60)
    return {
        "rank": 8,
        "scaling": 2.0,
        "seed": 1,
        "tasks": {"mood": {"train": {"rows": rows, "values": values}}},
    }


def _mean(values):
    return statistics.fmean(values) if values else None
