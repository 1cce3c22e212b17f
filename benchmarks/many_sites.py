"""The server of a large federation: 10,000 registered sites, 100 of them sampled in each round.

    python benchmarks/many_sites.py            # 100, 1,000 and 10,000 sites; three rules; adapters of a 7B model
    python benchmarks/many_sites.py --quick    # an eighth of the layers

Everything but the network and the sites' training is real: the server samples, every payload is made and serialized,
every reply is parsed, checked, held (on disk beyond 256 MiB) and aggregated, and the server's state is kept. Replies
are synthetic: rank 8 on q_proj and v_proj of Llama-2-7B (64 layers of 4096 × 4096); for the heterogeneous rule ranks
64, 32, 16 and 8 in turn with m = 16. Each case runs in its own process with one thread; the first of five rounds is a
warm-up. Memory is the peak resident set of the whole process.

Results go to benchmarks/results/many_sites.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from braidlora.config import FederatedConfig
from braidlora.federated import AdaptedLayer, ClientUpdate, get_rule
from braidlora.federated.protocol.clients import ClientSpec
from braidlora.federated.protocol.server import Server
from braidlora.federated.protocol.wire import pack_message, unpack_update
from braidlora.federated.simulation.spool import Spool
from braidlora.runs import environment

RESULTS = Path(__file__).parent / "results"
RULES, SITES, SAMPLED, ROUNDS = ("fed-alora", "fedit", "fed-alora-het"), (100, 1_000, 10_000), 100, 5
RANK, M, SCALING = 8, 16, 2.0
HET_RANKS = (64, 32, 16, 8)
WIDTH, LAYERS = 4096, 64


def measure(rule: str, sites: int, layer_count: int) -> dict[str, Any]:
    """Seconds per round (median), peak memory and message sizes of one case."""
    torch.set_num_threads(1)
    layers = [
        AdaptedLayer(f"base_model.model.model.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj", WIDTH, WIDTH)
        for i in range(layer_count)
    ]
    in_turn = HET_RANKS if rule.endswith("-het") else (RANK,)
    ranks = {f"site{i:05d}": in_turn[i % len(in_turn)] for i in range(sites)}
    start, held = time.perf_counter(), Spool()
    config = FederatedConfig.model_validate(
        {
            "model": {"path": "none"},
            "adapter": {"r": RANK, "lora_alpha": SCALING * RANK},
            "tasks": [{"name": "task", "train": "none.jsonl"}],
            "federation": {
                "rule": rule,
                "clients": [{"name": name, "tasks": ["task"], "rank": rank} for name, rank in ranks.items()],
                "sample": {"number": SAMPLED},
                "r_intermediate": M,
            },
            "output": "none",
        }
    )
    specs = {name: ClientSpec(name, rank, SCALING) for name, rank in ranks.items()}
    server = Server(config, specs, layers, {}, experiment="many", held=held)
    registered = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    replies = {
        rank: {
            name: torch.rand(shape, generator=generator) - 0.5
            for name, shape in get_rule(rule).upload_shapes(layers, rank, M).items()
        }
        for rank in set(in_turn)
    }

    seconds, cpu, seen, down, up = [], [], set(), 0, 0
    for number in range(1, ROUNDS + 1):
        before = time.perf_counter(), time.process_time()
        names = server.sample(number)
        with tempfile.TemporaryDirectory() as folder, held.use(Path(folder) / "updates"):
            server.open(number, names)
            for i, name in enumerate(names):
                sent = pack_message(server.payload(name, number))
                down = len(sent.header) + len(sent.tensors)
                answer = ClientUpdate(name, 100 + i, replies[ranks[name]], ranks[name], SCALING, number)
                message = pack_message(answer)
                up = len(message.header) + len(message.tensors)
                server.take(unpack_update(message))
            if why_not := server.close():
                raise RuntimeError(why_not)
        seen.update(names)
        seconds.append(time.perf_counter() - before[0])
        cpu.append(time.process_time() - before[1])
    return {
        "rule": rule,
        "sites": sites,
        "sampled": SAMPLED,
        "sites_seen": len(seen),
        "layers": layer_count,
        "registering_seconds": round(registered, 2),
        "round_seconds": round(statistics.median(seconds[1:]), 2),
        "round_cpu_seconds": round(statistics.median(cpu[1:]), 2),
        "peak_MiB": round(peak_mib()),
        "payload_MB": round(down / 1e6, 2),
        "update_MB": round(up / 1e6, 2),
    }


def peak_mib() -> float:
    """Peak resident set of the process."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"^VmHWM:\s+(\d+) kB", status, flags=re.M)[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the layers")
    parser.add_argument("--case", nargs=3, metavar=("RULE", "SITES", "LAYERS"), help="one case, as JSON")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/many_sites.json")
    arguments = parser.parse_args()
    if arguments.case:
        rule, sites, layers = arguments.case
        print(json.dumps(measure(rule, int(sites), int(layers))))
        return
    cells = []
    for rule in RULES:
        for sites in SITES:
            case = [rule, str(sites), str(LAYERS // 8 if arguments.quick else LAYERS)]
            done = subprocess.run(
                [sys.executable, __file__, "--case", *case], check=True, stdout=subprocess.PIPE, text=True
            )
            cells.append(json.loads(done.stdout))
            print(cells[-1], flush=True)
    out = arguments.out or RESULTS / f"many_sites{'-quick' if arguments.quick else ''}.json"
    result = {
        "kind": "many_sites",
        "command": " ".join(["python benchmarks/many_sites.py", *sys.argv[1:]]),
        "environment": environment(),
        "cells": cells,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
