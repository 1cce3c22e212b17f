"""Overhead of a federated round, and a federation with 200 clients.

    python benchmarks/federate_round.py          # overhead of a round: two base models, a few minutes on two cores
    python benchmarks/federate_round.py --many   # 200 clients on the embedded base model: time and peak memory

The time of a round is split into the steps of local training (between the Trainer events on_epoch_begin and
on_epoch_end) and overhead: creating Trainers, moving tensors, serializing, checking and aggregating updates, writing
and syncing the round. Rounds are not scored here. The first round (warm-up) and the last one (scored) are excluded.

Results go to benchmarks/results/federate_round.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import data_folder  # noqa: F401
from braidlora.config import FederatedConfig, load_config
from braidlora.federated.protocol.server import Server
from braidlora.federated.simulation import driver as local
from braidlora.federated.simulation import rounds as rounds_module
from braidlora.federated.simulation import runner
from braidlora.federated.site import local_training
from braidlora.federated.site.host import Host
from braidlora.runs import environment

RESULTS = Path(__file__).parent / "results" / "federate_round.json"
SECONDS: dict[str, float] = defaultdict(float)
SETTINGS = {
    "embedded base, 8 clients of 300 rows, r = 8 on all linear layers": (
        "fed_demo",
        ["--training.threads=1"],
    ),
    "MiniLM, 6 clients of 300 rows, r = 8 on query and value": ("fed_sentences", ["--tasks.*.test.limit=1"]),
}


def timed(owner: Any, name: str, label: str) -> None:
    """Accumulate the time spent in a function under `label`."""
    original: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            SECONDS[label] += time.perf_counter() - start

    setattr(owner, name, wrapped)


class Epochs(TrainerCallback):  # type: ignore[misc]
    """Time between the Trainer's first and last step."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        SECONDS["steps"] += time.perf_counter() - self._start


def instrument() -> None:
    original = local_training.ClientTrainer.__init__

    def with_clock(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Epochs())

    local_training.ClientTrainer.__init__ = with_clock  # type: ignore[method-assign]
    timed(local_training.ClientTrainer, "__init__", "building Trainers")
    timed(Host, "load", "tensors in and out")
    timed(Host, "read", "tensors in and out")
    timed(runner, "pack_message", "packing")
    timed(runner, "unpack_payload", "packing")
    timed(rounds_module, "pack_message", "packing")
    timed(Server, "take", "judging and aggregating")
    timed(Server, "close", "judging and aggregating")
    timed(runner.ClientStore, "hold", "clients' states")
    timed(rounds_module, "write_round", "writing the round")


def overhead(recipe: str, overrides: list[str], rounds: int) -> dict[str, Any]:
    """Seconds per round by category, and the share of overhead; medians over rounds."""
    spent: list[dict[str, float]] = []
    original = rounds_module.Rounds.run

    def measured(self: Any, round: int, bar: Any) -> None:
        SECONDS.clear()
        start = time.perf_counter()
        original(self, round, bar)
        spent.append({**SECONDS, "round": time.perf_counter() - start})

    rounds_module.Rounds.run = measured  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = [
                f"--federation.rounds={rounds + 2}",
                "--federation.evaluate_every=0",
                f"--output={folder}/run",
            ]
            local.federate(load_config(recipe, [*overrides, *options], FederatedConfig), progress=False)
    finally:
        rounds_module.Rounds.run = original  # type: ignore[method-assign]
    kept = spent[1:-1]
    parts = sorted({name for one in kept for name in one} - {"round", "steps"})
    shares = [1 - one["steps"] / one["round"] for one in kept]
    return {
        "rounds": len(kept),
        "round_seconds": statistics.median(one["round"] for one in kept),
        "step_seconds": statistics.median(one["steps"] for one in kept),
        "overhead_share": statistics.median(shares),
        "overhead_shares": shares,
        "of_which_seconds": {name: statistics.median(one.get(name, 0.0) for one in kept) for name in parts},
    }


def many(clients: int) -> dict[str, Any]:
    """A federation with many clients: wall time, time per client and round, peak memory."""
    recipe = {
        "model": {"path": "embedded"},
        "adapter": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "tasks": [{"name": "count", "train": {"source": "generated:count", "limit": 10 * clients},
                   "test": {"source": "generated:count", "limit": 2 * clients}, "max_new_tokens": 3}],
        "prompt": {"template": "{instruction} =", "cutoff": 64},
        "federation": {"partition": {"clients": clients, "min_rows": 5}, "rounds": 2, "evaluate_every": 0},
        "training": {"batch_size": 10, "learning_rate": 3e-3, "threads": 1},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = FederatedConfig.model_validate({**recipe, "output": f"{folder}/run"})
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        metrics = local.federate(config, progress=False).metrics
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "clients": clients,
        "rounds": 2,
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "seconds_per_client_and_round": seconds / (2 * clients),
        "peak_memory_mb": after.ru_maxrss / 1024,
        "disk_mb": disk / 1e6,
        "mean_score": metrics["mean"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds")
    parser.add_argument("--many", action="store_true", help="200 clients instead")
    parser.add_argument("--clients", type=int, default=200)
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if args.many:
        small, large = many(args.clients // 10), many(args.clients)
        results["many_clients"] = {"environment": environment(), "small": small, "large": large}
        print(json.dumps(results["many_clients"], indent=1))
    else:
        instrument()
        results["round"] = {"environment": environment()}
        for name, (recipe, overrides) in SETTINGS.items():
            results["round"][name] = overhead(recipe, overrides, args.rounds)
            print(name, json.dumps(results["round"][name], indent=1))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
