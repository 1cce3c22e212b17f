"""Sharing A or sharing B: gradients, movement and similarity of either factor.

    python benchmarks/rules_side_by_side.py fed-sentences  # first: trains the federations
    python benchmarks/shared_factor.py

For fed-alora (shares B), fedsa-lora (shares A) and local (shares nothing), from one A0 and from independent ones, at
the clients' models after the last round, for A and for B: cosines between the clients' gradients (mean and lowest pair)
and within a client's rows, ‖gradient‖·‖factor‖ (invariant when scale moves from A to B), how far a client moved the
factor in the last round, how much of that the mean over clients keeps, and the similarity of the clients' subspaces.

Results go to benchmarks/results/shared-factor.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from braidlora.analysis import analyze
from braidlora.comparison.statistics import summary
from braidlora.runs import FederatedDirectory, environment

RESULTS = Path(__file__).parent / "results"
FEDERATIONS = {
    "local": ("", "common A0"),
    "fed-alora": ("B", "common A0"),
    "fedsa-lora": ("A", "common A0"),
    "fed-alora_Aindependent": ("B", "independent"),
    "fedsa-lora_Aindependent": ("A", "independent"),
}
NUMBERS = ("between", "lowest", "within", "pull", "moved", "kept", "similarity", "chance")


def look_into(directory: Path, shared: str, rows: int) -> dict[str, dict[str, float | None]]:
    """The numbers of one federation, by factor."""
    found = analyze([directory], gradients=True, rows=rows)
    gradients, numbers = found["gradients"][directory.name], {}
    for factor in ("A", "B"):
        part = gradients["factors"][factor]
        pairs = [part["cosine"][i][j] for i, j in itertools.combinations(range(len(part["cosine"])), 2)]
        alike = found["similarity"][factor]["pairs"]
        pulls = [norm * size for norm, size in zip(part["norm"], norms(directory, factor), strict=True)]
        values = [
            part["between"], min(pairs), part["within"], float(np.mean(pulls)),
            *moved(directory, factor, shared=factor == shared), alike["similarity"], alike["chance"],
        ]  # fmt: skip
        numbers[factor] = dict(zip(NUMBERS, values, strict=True))
    return numbers


def norms(directory: Path, factor: str) -> list[float]:
    """Frobenius norm of the factor over all layers, by client in name order."""
    files = sorted(directory.glob("clients/*/adapter/adapter_model.safetensors"))
    return [norm(of_factor(load_file(path), factor)) for path in files]


def moved(directory: Path, factor: str, *, shared: bool) -> tuple[float, float]:
    """For the clients' changes Δ in their last local training: the mean of ‖Δ‖, and ‖mean of Δ‖ divided by it.

    All clients count equally. The mean of n orthogonal changes of equal length keeps 1/√n; of equal ones, all.
    """
    run = FederatedDirectory(directory)
    before, after = (run.checkpoint(step) for step in run.checkpoint_steps()[-2:])
    changes = []
    for path in sorted((after / "clients").iterdir()):
        start = before / ("shared.safetensors" if shared else f"clients/{path.name}")
        old, new = of_factor(load_file(start), factor), of_factor(load_file(path), factor)
        changes.append({name: new[name] - old[name] for name in old})
    mean_change = {name: torch.stack([one[name] for one in changes]).mean(0) for name in changes[0]}
    length = float(np.mean([norm(one) for one in changes]))
    return length, norm(mean_change) / length


def of_factor(tensors: dict[str, Tensor], factor: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith(f".lora_{factor}.weight")}


def norm(tensors: dict[str, Tensor]) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=64, help="training rows of each client")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    federations: list[dict[str, Any]] = []
    for name, (shared, start) in FEDERATIONS.items():
        each = [look_into(Path(f"runs/fed-sentences/{name}-seed{seed}"), shared, args.rows) for seed in seeds]
        federations += [
            {
                "rule": name.partition("_")[0],
                "start": start,
                "factor": factor,
                "shared": factor == shared,
                **{number: summary([one[factor][number] for one in each]) for number in NUMBERS},
            }
            for factor in ("A", "B")
        ]
        print(f"{name}: done", flush=True)
    result = {
        "kind": "shared_factor",
        "command": " ".join(["python benchmarks/shared_factor.py", *sys.argv[1:]]),
        "environment": environment(),
        "seeds": seeds,
        "rows": args.rows,
        "federations": federations,
    }
    path = RESULTS / "shared-factor.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
