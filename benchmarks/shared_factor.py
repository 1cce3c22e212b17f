"""Share A or share B: what the shared factor is pulled by, and what becomes of the clients' own.

    python benchmarks/rules_side_by_side.py fed-sentences  # first: the federations that are looked into
    python benchmarks/shared_factor.py

Of fed-alora (shares B) and fedsa-lora (shares A), from one A0 and from independent ones, at the clients' models after
the last round: cosines between the clients' gradients and within a client's rows, ‖gradient‖·‖factor‖ (which stays the
same when scale moves from A to B), the subspaces of the clients' own factors, and how far the last round moved the
shared one.

Results go to benchmarks/results/shared-factor.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from braidlora.analysis import analyze
from braidlora.comparison.statistics import summary
from braidlora.runs import FederatedDirectory, environment

RESULTS = Path(__file__).parent / "results"
RULES = ("fed-alora", "fedsa-lora")
STARTS = {"shared": "", "independent": "_Aindependent"}


def look_into(directory: Path, rows: int) -> dict[str, float | None]:
    """The numbers of one federation."""
    found = analyze([directory], gradients=True, rows=rows)
    gradients = found["gradients"][directory.name]
    [shared] = gradients["shared"]
    own = "B" if shared == "A" else "A"
    norms = mean_norms(directory)
    numbers: dict[str, float | None] = {}
    for which, factor in (("shared", shared), ("own", own)):
        part = gradients["factors"][factor]
        numbers[f"{which}_between"], numbers[f"{which}_within"] = part["between"], part["within"]
        numbers[f"{which}_gradient"] = float(np.mean(part["norm"])) * norms[factor]
    pairs = found["similarity"][own]["pairs"]
    numbers["own_similarity"], numbers["own_chance"] = pairs["similarity"], pairs["chance"]
    numbers["last_round"] = last_change(directory)
    return numbers


def mean_norms(directory: Path) -> dict[str, float]:
    """‖A‖ and ‖B‖ over all layers, mean over clients."""
    squares: dict[str, list[float]] = {"A": [], "B": []}
    for path in sorted(directory.glob("clients/*/adapter/adapter_model.safetensors")):
        tensors = load_file(path)
        for factor, found in squares.items():
            own = [tensor for name, tensor in tensors.items() if f".lora_{factor}." in name]
            found.append(sum(float(tensor.double().square().sum()) for tensor in own) ** 0.5)
    return {factor: float(np.mean(found)) for factor, found in squares.items()}


def last_change(directory: Path) -> float:
    """‖S_n − S_(n−1)‖ / ‖S_(n−1)‖ of the shared factor over the last round."""
    run = FederatedDirectory(directory)
    before, after = (
        load_file(run.checkpoint(step) / "shared.safetensors") for step in run.checkpoint_steps()[-2:]
    )
    names = [name for name in before if ".lora_" in name]
    change = sum(float((after[name] - before[name]).double().square().sum()) for name in names)
    return float((change / sum(float(before[name].double().square().sum()) for name in names)) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=64, help="training rows of each client")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    found: dict[str, Any] = {}
    for start, suffix in STARTS.items():
        for rule in RULES:
            each = [
                look_into(Path(f"runs/fed-sentences/{rule}{suffix}-seed{seed}"), args.rows) for seed in seeds
            ]
            found[f"{rule}, {start}"] = {
                "rule": rule,
                "client_init": start,
                **{name: summary([one[name] for one in each]) for name in each[0]},
            }
            print(f"{rule}, A {start}: done", flush=True)
    result = {
        "kind": "shared_factor",
        "command": " ".join(["python benchmarks/shared_factor.py", *sys.argv[1:]]),
        "environment": environment(),
        "seeds": seeds,
        "rows": args.rows,
        "federations": found,
    }
    path = RESULTS / "shared-factor.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
