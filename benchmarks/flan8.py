"""flan8_small.yaml end to end on a 3M-parameter base: train, SIGKILL, resume, evaluate, reload with plain PEFT.

    python benchmarks/flan8.py                                   # most of an hour on a busy core
    python benchmarks/flan8.py --training.max_steps=20 --keep    # overrides for every command; --keep keeps the run

The base model is far too small to solve these tasks, so scores say nothing about sharing schemes. The benchmark checks
whether the loss falls on every task, and whether the adapter learns the form of the answers: for a task with few
distinct answers, the share of predictions among them before and after training.

Results go to benchmarks/results/flan8.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import braidlora  # noqa: F401  # registers the adapter with PEFT
import data_folder  # noqa: F401
from braidlora.config import load_config
from braidlora.runs import environment, read_json, read_jsonl, split_lines
from braidlora.tasks import load_tasks

RECIPE = str(Path(__file__).with_name("flan8_small.yaml"))
RESULTS = Path(__file__).parent / "results" / "flan8.json"
RUN, BASE = Path("runs/flan8-benchmark"), Path("runs/flan8-benchmark-base")
CLOSED = 20  # tasks with at most this many distinct training answers have a closed set
FEW = 5  # log lines averaged for the first and last loss; a task is not in every step
RELOADED = 4  # rows per task answered again through plain PEFT


def braidlora_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "braidlora", *words]


def log(run: Path) -> list[dict[str, Any]]:
    path = run / "log.jsonl"
    lines = split_lines(path.read_bytes().decode(errors="replace")) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def train_with_a_kill(overrides: list[str]) -> dict[str, Any]:
    """Train, kill the process some steps after a checkpoint, and resume."""
    words = ["train", RECIPE, f"--output={RUN}", *overrides]
    process = subprocess.Popen(braidlora_command(*words))
    checkpoints = RUN / "checkpoints"
    while process.poll() is None:
        saved = [int(path.name[5:]) for path in checkpoints.glob("step-*")] if checkpoints.is_dir() else []
        reached = max((line["step"] for line in log(RUN) if "step" in line), default=0)
        if saved and reached > max(saved):
            break
        time.sleep(0.2)
    if process.poll() is not None:
        raise SystemExit(
            f"{RUN}: training ended before it could be killed; save more often (training.save_steps)"
        )
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(braidlora_command(*words, "--resume", "auto"), check=True)
    return {"killed_after_step": reached, "resumed_from_step": max(saved)}


def form(directory: Path, closed: dict[str, set[str]]) -> dict[str, Any]:
    """Share of predictions among the task's answers, for tasks with few distinct answers."""
    found = {}
    for path in sorted((directory / "predictions").glob("*.jsonl")):
        rows = read_jsonl(path)
        answers = closed.get(path.stem)
        of_the_form = [row for row in rows if answers and row["prediction"].strip() in answers]
        found[path.stem] = 100.0 * len(of_the_form) / len(rows) if answers else None
    return found


def mean_loss(lines: list[dict[str, Any]], task: str) -> float:
    found = [line["tasks"][task] for line in lines if line["tasks"].get(task) is not None]
    return sum(found) / len(found)


def reloaded(config: Any) -> dict[str, int]:
    """Answer some rows with PEFT alone; the answers must match those of `evaluate`."""
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    model = PeftModel.from_pretrained(base, str(RUN / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(RUN / "adapter"))
    same = rows = 0
    for task in config.tasks:
        for row in read_jsonl(RUN / "predictions" / f"{task.name}.jsonl")[:RELOADED]:
            prompt = tokenizer(row["prompt"], return_tensors="pt")
            new = task.max_new_tokens or config.evaluation.max_new_tokens
            output = model.generate(
                **prompt, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            same += answer.strip() == row["prediction"].strip()
            rows += 1
    return {"rows": rows, "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help=f"leave the run in {RUN}")
    arguments, given = parser.parse_known_args()
    overrides = ["--training.save_steps=100", *given]
    for folder in (RUN, BASE):
        shutil.rmtree(folder, ignore_errors=True)
    config = load_config(RECIPE, overrides)
    tasks = {task.name: task for task in load_tasks(config)}
    answers = {name: {row["output"].strip() for row in task.train} for name, task in tasks.items()}
    closed = {name: found for name, found in answers.items() if len(found) <= CLOSED}

    killed = train_with_a_kill(overrides)
    trained = read_json(RUN / "metrics.json")
    base_words = ["--recipe", RECIPE, "--directory", str(BASE), *overrides]
    subprocess.run(braidlora_command("evaluate", config.model.path, *base_words), check=True)
    subprocess.run(braidlora_command("evaluate", str(RUN), "--fresh"), check=True)
    again = read_json(RUN / "metrics.json")
    losses = [line for line in log(RUN) if "loss" in line]
    before, after = form(BASE, closed), form(RUN, closed)
    base = read_json(BASE / "metrics.json")
    result = {
        "kind": "flan8",
        "command": " ".join(["python", "benchmarks/flan8.py", *given]),
        "steps": losses[-1]["step"],
        "trainable_parameters": trained["trainable_parameters"],
        "seconds": trained["seconds"],
        **killed,
        "evaluated_again_with_the_same_scores": all(
            trained["tasks"][name]["score"] == again["tasks"][name]["score"] for name in tasks
        ),
        "reloaded_with_peft": reloaded(config),
        "tasks": {
            name: {
                "loss_first": mean_loss(losses[:FEW], name),
                "loss_last": mean_loss(losses[-FEW:], name),
                "answers": len(answers[name]),
                "in_form_base": before[name],
                "in_form": after[name],
                "metric": trained["tasks"][name]["metric"],
                "score_base": base["tasks"][name]["score"],
                "score": trained["tasks"][name]["score"],
            }
            for name in tasks
        },
        "environment": environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {RESULTS}")
    if not arguments.keep:
        for folder in (RUN, BASE):
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
