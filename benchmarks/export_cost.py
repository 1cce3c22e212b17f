"""Cost of fixed expert weights for a real ALoRA run: its scores with the router and as plain LoRAs.

    braidlora compare sentences6 --methods alora --seeds 0 --no-single-task '--tasks.*.train.limit=300' \
        '--tasks.*.test.limit=500' --training.epochs=2 --training.gradient_accumulation=1 --training.warmup_steps=20 \
        --output=runs/sentences6-small
    python benchmarks/export_cost.py runs/sentences6-small/cells/alora-seed0

The run is exported with uniform weights, and for every task with the mean weights of its training rows. Each export is
scored on the run's test rows. Results go to benchmarks/results/export_cost.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from braidlora.export.run import export
from braidlora.runs import RunDirectory, environment, read_json

RESULTS = Path(__file__).parent / "results"


def cost(run: Path, weights: str) -> dict[str, Any]:
    """Scores by task before and after export, for all tasks or the named one."""
    with tempfile.TemporaryDirectory() as folder:
        record = export(run, Path(folder) / "lora", static_weights=weights, progress=False)
    measured: dict[str, Any] = record["cost"]["tasks"]
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="directory of a finished run with a router")
    run = parser.parse_args().run
    tasks = list(read_json(RunDirectory(run).metrics)["tasks"])
    uniform = cost(run, "uniform")
    own = {task: cost(run, f"task={task}")[task] for task in tasks}
    result = {
        "kind": "export_cost",
        "command": f"python benchmarks/export_cost.py {run}",
        "environment": environment(),
        "tasks": {
            task: {
                "metric": uniform[task]["metric"],
                "n": uniform[task]["n"],
                "router": uniform[task]["before"],
                "uniform": uniform[task]["after"],
                "own": own[task]["after"],
            }
            for task in tasks
        },
    }
    path = RESULTS / "export_cost.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
