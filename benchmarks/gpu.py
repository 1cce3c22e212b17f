"""All GPU checks, in one call of at most ten minutes.

    python benchmarks/gpu.py                        # all stages; results in benchmarks/results/gpu/
    python benchmarks/gpu.py --stages tests,layer   # some of them
    python benchmarks/gpu.py --stages induction     # a table of the results; call again to resume
    python benchmarks/gpu.py --rehearse             # the same code with tiny sizes on the CPU, in runs/gpu-rehearsal/
    python benchmarks/gpu.py --list                 # the stages, their time limits, and which are complete

Each stage is a separate process with a time limit that writes STAGE.json row by row: a stage that times out or fails
keeps its rows so far and does not stop the next one. A repeated call skips complete stages (unless --again is given).
A table (see benchmarks/evidence.py and benchmarks/rules_side_by_side.py) is not in the default set; its runs are kept,
and finished ones are not run again.
summary.json lists the state of every stage; the exit code is 1 unless all are complete.
`scripts/gpu_wheels.py` prepares the Python packages for a GPU machine without a network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS, REHEARSAL = HERE / "results" / "gpu", Path("runs") / "gpu-rehearsal"
_SHOWN = 4000  # characters of a failed stage's output kept in the summary


class Stage(NamedTuple):
    name: str
    limit: int  # seconds on a GPU
    what: str
    table: str = ""  # the module that runs this table of the results: by name only; resumes across calls


STAGES = (
    Stage("environment", 25, "versions, device, copy bandwidth, matrix products"),
    Stage("tests", 120, "pytest -m cuda"),
    Stage(
        "layer",
        150,
        "one adapted layer compared with PEFT LoRA, the loop over experts, and unsloth's if installed",
    ),
    Stage("decode", 60, "cached greedy decoding, base, PEFT LoRA and ALoRA"),
    Stage(
        "step", 150, "a training step of a Llama-3-8B-shaped model: q,o and all-linear, 16-bit and 4-bit base"
    ),
    Stage("train", 80, "braidlora train demo, killed and resumed"),
    Stage("induction", 540, "eight induction tasks on SmolLM2-135M", "table"),
    Stage("parts", 540, "what in ALoRA matters, on the same tasks", "table"),
    Stage("flan8-smollm2", 540, "the paper's eight FLAN tasks on SmolLM2-135M, all rows", "table"),
    Stage("induction-all", 540, "all 21 induction tasks on SmolLM2-135M, all rows", "table"),
    Stage("induction-gemma", 540, "all 21 induction tasks on Gemma-3-270M, all rows", "table"),
    Stage("flan8-gemma", 540, "the paper's eight FLAN tasks on Gemma-3-270M, all rows", "table"),
    Stage("fed-induction", 540, "eight induction clients on SmolLM2-135M, all rules", "federations"),
    Stage(
        "fed-flan8-smollm2", 540, "the paper's eight FLAN clients on SmolLM2-135M, all rows", "federations"
    ),
)
DEFAULT = [stage for stage in STAGES if not stage.table]
SAVING = 20  # seconds that a table has to save its runs
REHEARSAL_LIMIT = 600  # seconds for any stage on a shared CPU


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", help="names separated by commas; default: all but the tables")
    parser.add_argument("--limit", type=int, help="seconds for each stage, instead of its own limit")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--again", action="store_true", help="also run complete stages")
    parser.add_argument("--list", action="store_true", help="list the stages and exit")
    parser.add_argument(
        "--out", type=Path, help=f"default: {RESULTS.relative_to(HERE.parent)}, rehearsed {REHEARSAL}"
    )
    arguments = parser.parse_args()
    out = arguments.out or (REHEARSAL if arguments.rehearse else RESULTS)
    chosen = _chosen(arguments.stages, parser)
    if arguments.list:
        for stage in STAGES:
            print(f"{stage.name:12} {stage.limit:4d} s  {_state(out, stage.name):9}  {stage.what}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for stage in chosen:
        if _state(out, stage.name) == "complete" and not arguments.again:
            print(f"{stage.name}: complete already")
            continue
        _run(stage, out, arguments.rehearse, arguments.limit)
    states = {stage.name: _state(out, stage.name) for stage in chosen}
    print(", ".join(f"{name} {state}" for name, state in states.items()))
    return 0 if all(state == "complete" for state in states.values()) else 1


def _chosen(names: str | None, parser: argparse.ArgumentParser) -> list[Stage]:
    if names is None:
        return DEFAULT
    known = {stage.name: stage for stage in STAGES}
    given = names.split(",")
    if unknown := [name for name in given if name not in known]:
        parser.error(f"--stages: unknown {', '.join(unknown)}; the stages are {', '.join(known)}")
    return [known[name] for name in given]


def _state(out: Path, name: str) -> str:
    """`complete`, `partial` (has rows, but did not finish), `failed`, `timeout`, or `new`."""
    summary = _read(out / "summary.json").get(name)
    if summary is not None:
        return str(summary["state"])
    return "partial" if (out / f"{name}.json").is_file() else "new"


def _run(stage: Stage, out: Path, rehearse: bool, limit: int | None = None) -> None:
    result = out / f"{stage.name}.json"
    result.unlink(missing_ok=True)
    device = "cpu" if rehearse else "cuda"
    command = [
        sys.executable,
        "-m",
        f"gpu_stages.{stage.table or stage.name}",
        "--device",
        device,
        "--out",
        str(result.resolve()),
        *(["--table", stage.name] if stage.table else []),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE.resolve()), os.environ.get("PYTHONPATH")])
    )
    limit = limit or (REHEARSAL_LIMIT if rehearse else stage.limit)
    log = out / f"{stage.name}.log"
    print(f"{stage.name}: {stage.what} (at most {limit} s)", flush=True)
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        # A new session, so that a timeout also kills the children of a stage.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            _stop(process, stage)
            code = None
    entry: dict[str, Any] = {
        "state": "timeout" if code is None else "complete" if code == 0 else "failed",
        "seconds": round(time.monotonic() - start, 1),
        "limit": limit,
        "rehearsed": rehearse,
    }
    if code != 0:
        entry["exit_code"] = code
        shown = log.read_text(encoding="utf-8", errors="replace")[-_SHOWN:]
        entry["output"] = shown.replace(str(HERE.parent.resolve()), ".").replace(sys.prefix, "PREFIX")
        print(entry["output"])
    print(f"{stage.name}: {entry['state']} after {entry['seconds']} s", flush=True)
    summary = {**_read(out / "summary.json"), stage.name: entry}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _stop(process: subprocess.Popen[bytes], stage: Stage) -> None:
    """Kill a stage and its children; a table first gets the time to save."""
    if stage.table:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SAVING)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
