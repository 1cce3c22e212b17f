"""What a training step costs with the logits of all positions, and with those that carry loss alone.

    python benchmarks/loss_positions.py            # SmolLM2-135M, rows of flan8 and induction21
    python benchmarks/loss_positions.py demo       # another recipe

Training asks the model for the logits of the positions before an answer's tokens; prompts and padding have none. Both
variants take the same batches in turns, forward and backward, with one thread; ratios are paired by batch.

Results go to benchmarks/results/loss_positions.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import data_folder  # noqa: F401
from braidlora.config import RunConfig, load_config
from braidlora.models.attach import attach_adapter
from braidlora.models.base import load_base
from braidlora.runs import environment
from braidlora.tasks import Collator, MixingSampler, encode_tasks, load_tasks
from braidlora.training.arguments import training_arguments
from braidlora.training.trainer import MultiTaskTrainer
from evidence import installed_base

RESULT = Path(__file__).parent / "results" / "loss_positions.json"
BATCHES = 8


def trainer_of(config: RunConfig, folder: str) -> MultiTaskTrainer:
    """A trainer over the recipe's training rows, without a run directory."""
    base, tokenizer = load_base(config.model, None)
    rows = encode_tasks(load_tasks(config), tokenizer, config.prompt, "train", None)
    per_step = config.training.batch_size * config.training.gradient_accumulation
    sampler = MixingSampler(rows, config.mixing, config.seed, per_step)
    model = attach_adapter(base, config, config.seed).train()
    model.config.use_cache = False  # as in the Trainer
    collator = Collator(tokenizer.pad_token_id)
    return MultiTaskTrainer(
        model, training_arguments(config, folder, len(sampler)), rows, None, sampler, collator
    )


def seconds(trainer: MultiTaskTrainer, batch: dict[str, Any], every: bool) -> float:
    """Of a forward and backward pass."""
    inputs = {name: value for name, value in batch.items() if not (every and name == "loss_positions")}
    trainer.model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    trainer.compute_loss(trainer.model, inputs).backward()
    return time.perf_counter() - start


def case(recipe: str, base: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one recipe with a LoRA on its rows."""
    words = [f"--{key}={value}" for key, value in base.items()]
    config = load_config(recipe, [*words, "--model.dtype=float32", "--adapter.method=lora"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(config, folder)
        loader = iter(trainer.get_train_dataloader())
        batches = [next(loader) for _ in range(BATCHES)]
        for every in (True, False):
            seconds(trainer, batches[0], every)
        times = [(seconds(trainer, batch, True), seconds(trainer, batch, False)) for batch in batches]
    positions = sum(batch["labels"].numel() for batch in batches)
    return {
        "recipe": recipe,
        "base": config.model.path,
        "kept_share": sum(batch["loss_positions"].numel() for batch in batches) / positions,
        "every_ms": 1000 * statistics.median(one for one, _ in times),
        "kept_ms": 1000 * statistics.median(other for _, other in times),
        "ratio": statistics.median(other / one for one, other in times),
        "batches": BATCHES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="default: flan8 and induction21, on SmolLM2-135M")
    given = parser.parse_args().recipes
    torch.set_num_threads(1)
    base = {} if given else dict(installed_base("smollm2"))
    cases = []
    for recipe in given or ["flan8", "induction21"]:
        cases.append(case(recipe, base))
        print(json.dumps(cases[-1]), flush=True)
    if not given:
        report = {
            "kind": "loss_positions", "command": "python benchmarks/loss_positions.py", "environment": environment(),
            "cases": cases,
        }  # fmt: skip
        RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
