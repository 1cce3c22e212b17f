"""Server cost of aggregation: CPU time per client and peak memory, for adapters the size of a 7B model's.

    python benchmarks/aggregate.py            # 10, 100 and 1000 clients; FLoRA and FlexLoRA up to 100
    python benchmarks/aggregate.py --quick    # an eighth of the layers, 10 and 40 clients

Clients are synthetic: rank 8 on q_proj and v_proj of Llama-2-7B (64 layers of 4096 × 4096), and for the heterogeneous
rule ranks 64, 64, 32, 32, 16, 16, 8, 8 in turn with m = 16. Every case runs in a separate process with one thread and
times the server's second round: reading an upload (safetensors, float32), `Server.take` (the guard, the size of the
change, holding the update, on disk beyond 256 MiB), and `Server.close` (the outlier limit, the aggregate, norm and
cosine of every client). Memory is the growth of the peak resident set, which Linux lets a process reset.

Results go to benchmarks/results/aggregate.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from braidlora.config import FederatedConfig
from braidlora.federated import RULE_NAMES, AdaptedLayer, ClientUpdate, get_rule
from braidlora.federated.protocol.clients import ClientSpec
from braidlora.federated.protocol.server import Server
from braidlora.federated.protocol.wire import unpack
from braidlora.federated.simulation.spool import Spool
from braidlora.runs import environment

RESULTS = Path(__file__).parent / "results"
RANK, M, SCALING = 8, 16, 2.0
HET, HET_RANKS = "fed-alora-het", [64, 64, 32, 32, 16, 16, 8, 8]
STACKING = ("flora", "flexlora")
WIDTH, LAYERS = 4096, 64


def recipe(rule: str, ranks: dict[str, int]) -> FederatedConfig:
    """A recipe for this rule with one client per rank; its task is never read."""
    clients = [{"name": name, "tasks": ["task"], "rank": rank} for name, rank in ranks.items()]
    return FederatedConfig.model_validate(
        {
            "model": {"path": "none"},
            "adapter": {"r": RANK, "lora_alpha": SCALING * RANK},
            "tasks": [{"name": "task", "train": "none.jsonl"}],
            "federation": {"rule": rule, "clients": clients, "r_intermediate": M},
            "output": "none",
        }
    )


def measure(rule: str, clients: int, layer_count: int) -> dict[str, Any]:
    """The second round of a rule with synthetic clients; CPU time in milliseconds, memory in MiB."""
    torch.set_num_threads(1)
    layers = [
        AdaptedLayer(f"base_model.model.model.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj", WIDTH, WIDTH)
        for i in range(layer_count)
    ]
    in_turn = HET_RANKS if rule == HET else [RANK]
    ranks = {f"client{i:04d}": in_turn[i % len(in_turn)] for i in range(clients)}
    held = Spool()
    specs = {name: ClientSpec(name, rank, SCALING) for name, rank in ranks.items()}
    server = Server(recipe(rule, ranks), specs, layers, {}, held=held)
    generator = torch.Generator().manual_seed(0)

    def upload(rank: int) -> bytes:
        shapes = get_rule(rule).upload_shapes(layers, rank, M)
        return save({n: torch.rand(shape, generator=generator) - 0.5 for n, shape in shapes.items()})

    # Averaging does not depend on the values: a few uploads are sent in turn. Stacked factors must be independent.
    pool = None if rule in STACKING else {rank: [upload(rank) for _ in range(3)] for rank in set(in_turn)}

    def one_round(number: int, names: list[str]) -> dict[str, float]:
        spent = dict.fromkeys(("read", "take", "close"), 0.0)
        server.open(number, names)
        for i, name in enumerate(names):
            rank = ranks[name]
            data = upload(rank) if pool is None else pool[rank][number * i % 3]
            marks = [time.process_time()]
            update = ClientUpdate(name, 100 + i, unpack(data), rank, SCALING, number)
            marks.append(time.process_time())
            server.take(update)
            marks.append(time.process_time())
            spent["read"] += marks[1] - marks[0]
            spent["take"] += marks[2] - marks[1]
        start = time.process_time()
        if why_not := server.close():
            raise RuntimeError(why_not)
        spent["close"] = time.process_time() - start
        return spent

    with tempfile.TemporaryDirectory() as folder, held.use(Path(folder) / "updates"):
        one_round(1, list(ranks)[:3])  # to have a shared state
        Path("/proc/self/clear_refs").write_text("5")  # creating the uploads also took memory
        before = peak_mib()
        spent = one_round(2, list(ranks))
    per_client = {f"{what}_ms": round(1e3 * seconds / clients, 2) for what, seconds in spent.items()}
    return {
        "rule": rule,
        "clients": clients,
        "layers": layer_count,
        "upload_MiB": round(len(upload(in_turn[0])) / 2**20, 1),
        **per_client,
        "total_ms": round(1e3 * sum(spent.values()) / clients, 2),
        "memory_grown_MiB": round(peak_mib() - before),
        "peak_MiB": round(peak_mib()),
        "shared_MiB": round(
            sum(t.numel() * t.element_size() for t in server.state().shared.values()) / 2**20, 1
        ),
    }


def peak_mib() -> float:
    """Peak resident set of the process since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"^VmHWM:\s+(\d+) kB", status, flags=re.M)[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rules", nargs="+", default=list(RULE_NAMES), choices=RULE_NAMES)
    parser.add_argument("--case", nargs=3, metavar=("RULE", "CLIENTS", "LAYERS"), help="one case, as JSON")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/aggregate.json")
    arguments = parser.parse_args()
    if arguments.case:
        rule, clients, layers = arguments.case
        print(json.dumps(measure(rule, int(clients), int(layers))))
        return
    sizes = [10, 40] if arguments.quick else [10, 100, 1000]
    cells = []
    number = count(1)
    for rule in arguments.rules:
        for clients in sizes:
            if rule == "local" or (rule in STACKING and clients > 100):
                continue
            case = [rule, str(clients), str(LAYERS // 8 if arguments.quick else LAYERS)]
            command = [sys.executable, __file__, "--case", *case]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            cells.append(json.loads(done.stdout))
            shown = {
                key: value for key, value in cells[-1].items() if key not in ("rule", "clients", "layers")
            }
            print(f"{next(number):3d} {rule:14s} {clients:5d} clients  {shown}", flush=True)
    out = arguments.out or RESULTS / f"aggregate{'-quick' if arguments.quick else ''}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"environment": environment(), "cells": cells}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
