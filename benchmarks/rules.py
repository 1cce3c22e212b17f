"""Error of each rule's aggregate relative to Σ pᵢ ΔWᵢ, and the effect of malicious clients. A minute on one core.

    python benchmarks/rules.py            # 5 seeds
    python benchmarks/rules.py --quick    # 1 seed

Bias: eight clients each fit a LoRA to their own 64 × 64 update, W + δᵢ with ‖δᵢ‖ ≈ ‖W‖, by Adam on the squared error,
starting from one A0 (`shared`) or one each (`independent`), then one round is aggregated. The error is that of the
aggregate's ΔW against Σ pᵢ ΔWᵢ in the Frobenius norm, relative to the latter.
FlexLoRA's error is the truncation to the client's rank, which is the best that any LoRA of that rank can do.

Malicious clients: 0, 1, 2 or 3 of ten send ten times the negative of their change. The error is that of the aggregate's
change against the mean change of the honest clients, relative to the latter. The norm clip is set to the norm of an
honest change.

Results go to benchmarks/results/rules.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braidlora.federated import ClientUpdate, get_rule
from braidlora.federated.protocol.robust import get_aggregator
from braidlora.runs import environment

RESULTS = Path(__file__).parent / "results"
WIDTH, CLIENTS, RANK, SCALING = 64, 8, 8, 2.0
MIXED_RANKS = [16, 16, 8, 8, 4, 4, 2, 2]
STEPS = [10, 100, 1000]
A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def fit(target: Tensor, A0: Tensor, steps: int, train_A: bool) -> dict[str, Tensor]:
    """A LoRA (A, B) fitted to the target update from A0 and B = 0."""
    a = A0.clone().requires_grad_(train_A)
    b = torch.zeros(WIDTH, A0.shape[0], dtype=A0.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([a, b] if train_A else [b], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (SCALING * b @ a - target).square().sum().backward()
        optimizer.step()
    return {A: a.detach(), B: b.detach()}


def bias(name: str, init: str, steps: int, seed: int) -> float:
    """Relative error of one round's aggregate."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    ranks = [RANK] * CLIENTS if name in ("fedit", "ffa-lora") else MIXED_RANKS
    common, shared_A0 = draw(WIDTH, WIDTH) / 8, draw(max(ranks), WIDTH) / 8
    rule, total, exact = get_rule(name), 0, torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    rule.start({})
    state: dict[str, Tensor] = {}
    for i, rank in enumerate(ranks):
        own_A0 = draw(rank, WIDTH) / 8
        state = fit(
            common + draw(WIDTH, WIDTH) / 8,
            shared_A0[:rank] if init == "shared" or name == "ffa-lora" else own_A0,
            steps,
            name != "ffa-lora",
        )
        rows = 100 * (i + 1)
        total += rows
        exact += rows * SCALING * state[B] @ state[A]
        rule.add(ClientUpdate(f"client{i}", rows, rule.outgoing(state), rank, SCALING))
    exact /= total
    shared, largest = rule.finish(), max(ranks)
    received = {**state, **rule.received(rule.payload_for(shared, largest), largest)}
    scaling = 1.0 if name == "flora" else SCALING
    return float((scaling * received[B] @ received[A] - exact).norm() / exact.norm())


ROBUST: dict[str, dict[str, Any]] = {
    "mean": {},
    "norm-clip": {},
    "median": {},
    "trimmed-mean": {"trim": 0.3},
    "krum": {"f": 3, "clients": 10},
    "multi-krum": {"f": 3, "clients": 10, "keep": 4},
}


def liars(kind: str, count: int, seed: int) -> float:
    """Relative error of fed-alora's change in one round with `count` malicious clients of ten."""
    generator = torch.Generator().manual_seed(seed)
    start, direction = (torch.randn(WIDTH, RANK, generator=generator, dtype=torch.float64) for _ in range(2))
    settings = dict(ROBUST[kind])
    if kind == "norm-clip":
        settings["max_norm"] = float(direction.norm()) * math.sqrt(1.25)
    rule = get_rule("fed-alora", aggregator=get_aggregator(kind, **settings))
    rule.start({B: start})
    honest = torch.zeros_like(start)
    for i in range(10):
        change = direction + 0.5 * torch.randn(WIDTH, RANK, generator=generator, dtype=torch.float64)
        if i < count:
            change = -10.0 * change
        else:
            honest += change / (10 - count)
        rule.add(ClientUpdate(f"client{i}", 100, {B: start + change}, RANK, SCALING))
    return float((rule.finish()[B] - start - honest).norm() / honest.norm())


def summary(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/rules.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(1 if arguments.quick else 5)
    biases, attacks = [], []
    print("error of the aggregate, by local steps:", STEPS)
    for name in ("fedit", "ffa-lora", "zero-padding", "flora", "flexlora"):
        for init in ("shared",) if name == "ffa-lora" else ("shared", "independent"):
            row = {steps: summary([bias(name, init, steps, seed) for seed in seeds]) for steps in STEPS}
            biases.append({"rule": name, "client_init": init, "relative_error_by_steps": row})
            print(
                f"  {name:14s} {init:12s} "
                + "  ".join(f"{v['mean']:.2g} ± {v['std']:.1g}" for v in row.values())
            )
    print("error of fed-alora's change with 0, 1, 2, 3 malicious clients of ten:")
    for kind in ROBUST:
        row = {count: summary([liars(kind, count, seed) for seed in seeds]) for count in range(4)}
        attacks.append({"aggregator": kind, "settings": ROBUST[kind], "relative_error_by_liars": row})
        print(f"  {kind:14s} " + "  ".join(f"{v['mean']:.2f} ± {v['std']:.2f}" for v in row.values()))
    out = arguments.out or RESULTS / f"rules{'-quick' if arguments.quick else ''}.json"
    out.parent.mkdir(exist_ok=True)
    result = {"environment": environment(), "seeds": len(seeds), "bias": biases, "liars": attacks}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
