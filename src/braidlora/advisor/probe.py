"""The probe: one plain LoRA per task for a few steps, all from one A, then gradients of all tasks at their average.

The average of the tasks' LoRAs is the point where a shared factor would be after one round of averaging: B is not zero
there, so both factors have a gradient, and no task is at home.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from braidlora.advisor.cost import ProbePlan
from braidlora.advisor.measures import (
    as_matrix,
    column_similarity,
    cosines,
    moment_cosines,
    second_moment,
    update_products,
)
from braidlora.analysis.batches import Batch, drawn_rows, task_batches
from braidlora.analysis.gradients import adapter_factors, measure_gradients, name_parts
from braidlora.config import MixingSection, RunConfig
from braidlora.errors import DataError
from braidlora.models.attach import attach_adapter
from braidlora.models.base import check_cutoff, enable_gradient_checkpointing, load_base
from braidlora.models.loading import Loaded
from braidlora.tasks import Collator, LabelSpace, MixingSampler, Row, Task, encode_tasks
from braidlora.tasks.class_weights import class_weights
from braidlora.terminal import say
from braidlora.training.arguments import training_arguments
from braidlora.training.failures import explain_step_out_of_memory
from braidlora.training.threads import cpu_threads
from braidlora.training.trainer import MultiTaskTrainer, model_restored

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        tasks: in order; the matrices below are tasks × tasks.
        losses: mean training loss of each task's LoRA over the probe.
        gradients: at the average of the LoRAs, see `measure_gradients`.
        updates: cosines between the tasks' ΔW, all layers together.
        columns: similarity of the tasks' B's, mean over layers, and its chance level; None without full rank.
        inputs: cosines of the second moments of A x, mean over layers.
        load_seconds, train_seconds, measure_seconds: of the base, of all LoRAs, and of the rest.
    """

    tasks: list[str]
    losses: dict[str, float]
    gradients: dict[str, Any]
    updates: list[list[float | None]]
    columns: tuple[list[list[float | None]], float] | None
    inputs: list[list[float | None]]
    load_seconds: float
    train_seconds: float
    measure_seconds: float


def run_probe(config: RunConfig, tasks: Sequence[Task], plan: ProbePlan, progress: bool = True) -> Probed:
    """Train the LoRAs and measure.

    Args:
        config: a recipe with a plain LoRA.
        tasks: with training rows, all of the recipe's.
        plan: its size.
        progress: a line per task on stderr.

    Raises:
        ConfigError, DataError: the recipe or its data cannot be used.
        TrainingError: a loss or gradient is not finite, or memory ran out.
    """
    with cpu_threads(config.training.threads):
        start = time.monotonic()
        loaded = _load(config, tasks)
        slots = {name: one for name, one in loaded.model.named_parameters() if one.requires_grad}
        initial = _copies(slots)
        at = [time.monotonic()]
        trained, losses = [], {}
        for number, task in enumerate(tasks, start=1):
            _restore(slots, initial)
            losses[task.name] = _train(loaded, task, plan)
            trained.append(_copies(slots))
            if progress:
                done = (
                    f"[{number}/{len(tasks)}] {task.name}: {plan.steps} steps, loss {losses[task.name]:.2f}"
                )
                say(done, file=sys.stderr, flush=True)
        at.append(time.monotonic())
        _restore(slots, {name: torch.stack([one[name] for one in trained]).mean(0) for name in initial})
        loaded.model.eval()
        gradients = measure_gradients(loaded, plan.gradient_rows)
        inputs = _inputs(loaded, plan.gradient_rows)
        updates, columns = _factors(loaded.model, trained)
        at.append(time.monotonic())
    return Probed(
        tasks=[task.name for task in tasks],
        losses=losses,
        gradients=gradients,
        updates=as_matrix(cosines(updates)),
        columns=columns,
        inputs=as_matrix(inputs),
        load_seconds=at[0] - start,
        train_seconds=at[1] - at[0],
        measure_seconds=at[2] - at[1],
    )


def _load(config: RunConfig, tasks: Sequence[Task]) -> Loaded:
    label_space = LabelSpace.of(list(tasks)) if config.kind == "classify" else None
    set_seed(config.seed)
    base, tokenizer = load_base(config.model, label_space)
    check_cutoff(base, config)
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(base)
    if torch.cuda.is_available() and config.model.quantization == "none":
        base.to("cuda")
    model = attach_adapter(base, config, config.seed)
    return Loaded(model, tokenizer, config, list(tasks), label_space)


def _train(loaded: Loaded, task: Task, plan: ProbePlan) -> float:
    """The model's LoRA on one task; returns its mean training loss."""
    config = _config_of_steps(loaded.config, plan)
    rows = training_rows(task, plan, config.seed)
    alone = [replace(other, train=rows if other is task else []) for other in loaded.tasks]
    data = encode_tasks(alone, loaded.tokenizer, config.prompt, "train", loaded.label_space)
    if not len(data):
        raise DataError(f"task {task.name}: no training row can be used; see `braidlora preview`.")
    with tempfile.TemporaryDirectory() as unused:
        arguments = training_arguments(config, Path(unused), len(data))
        arguments.save_strategy = "no"
        trainer = MultiTaskTrainer(
            loaded.model, arguments, data, None, MixingSampler(data, config.mixing, config.seed),
            Collator(loaded.tokenizer.pad_token_id, config.kind),
            label_space=loaded.label_space,
            class_weights=class_weights(config, loaded.tasks, loaded.label_space),
            multipliers=config.training.rate_multipliers,
        )  # fmt: skip
        set_seed(config.seed)
        with model_restored(loaded.model), explain_step_out_of_memory():
            return float(trainer.train().training_loss)


def training_rows(task: Task, plan: ProbePlan, seed: int) -> list[Row]:
    """The rows that a task's LoRA trains on, drawn with the recipe's seed: a file may be sorted, by label for example.

    None of those that gradients are measured on, if there are others.
    """
    measured = {id(row) for row in drawn_rows(task, "train", plan.gradient_rows, seed)}
    others = [row for row in task.train if id(row) not in measured]
    rows = others if len(others) >= plan.batch_size else task.train
    wanted = plan.steps * plan.batch_size
    return random.Random(f"{seed}/{task.name}/probe").sample(rows, min(wanted, len(rows)))


def _config_of_steps(config: RunConfig, plan: ProbePlan) -> RunConfig:
    """The recipe of a task's few steps: its learning rate from the second step on, to the end."""
    training = config.training.model_copy(
        update={
            "max_steps": plan.steps, "warmup_steps": 1, "scheduler": "constant_with_warmup",
            "batch_size": plan.batch_size, "gradient_accumulation": 1, "logging_steps": 10**9, "report_to": [],
            "load_best": False, "eval_steps": None,
        }
    )  # fmt: skip
    prompt = config.prompt.model_copy(update={"packing": False})
    return config.model_copy(update={"training": training, "mixing": MixingSection(), "prompt": prompt})


def _copies(slots: Mapping[str, nn.Parameter]) -> Tensors:
    return {name: slot.detach().to("cpu", torch.float32).clone() for name, slot in slots.items()}


@torch.no_grad()
def _restore(slots: Mapping[str, nn.Parameter], tensors: Tensors) -> None:
    for name, slot in slots.items():
        slot.copy_(tensors[name])


def _factors(
    model: nn.Module, trained: Sequence[Tensors]
) -> tuple[Tensor, tuple[list[list[float | None]], float] | None]:
    """Inner products of the updates over all layers, and similarity of the B's with its chance level."""
    names: dict[str, dict[str, str]] = {}
    by_parameter = {id(one): name for name, one in model.named_parameters()}
    for name, parameter in adapter_factors(model).items():
        layer, factor = name_parts(name)
        names.setdefault(layer, {})[factor] = by_parameter[id(parameter)]
    products, similar = [], []
    for pair in names.values():
        A, B = (torch.stack([one[pair[factor]] for one in trained]) for factor in "AB")
        products.append(update_products(A, B))
        similar.append(column_similarity(list(B)))
    known = [one for one in similar if one is not None]
    columns = None
    if known:
        mean = torch.stack([matrix for matrix, _ in known]).mean(0)
        columns = (as_matrix(mean), sum(chance for _, chance in known) / len(known))
    return torch.stack(products).sum(0), columns


@torch.no_grad()
def _inputs(loaded: Loaded, rows: int) -> Tensor:
    """Cosines of the second moments of A x between tasks, the mean over layers, (T, T)."""
    tasks = task_batches(loaded, rows, ("train",))
    halves: tuple[list[Tensors], list[Tensors]] = ([], [])
    for task in tasks:
        for half, batches in zip(halves, task.halves, strict=True):
            half.append(_moments(loaded.model, batches))
    names = [name for name in halves[0][0] if all(name in found for half in halves for found in half)]
    found = [
        moment_cosines(*(torch.stack([moments[name] for moments in half]) for half in halves))
        for name in names
    ]
    return torch.stack(found).mean(0)


def _moments(model: nn.Module, batches: Sequence[Batch]) -> Tensors:
    """Second moments of A x over batches, by layer; without those that do not see rows of tokens."""
    sums: Tensors = {}
    mask: list[Tensor] = []

    def watch(name: str, module: nn.Module, inputs: Any, z: Tensor) -> None:
        if z.shape[:-1] == mask[0].shape:
            moment = second_moment(z, mask[0]).cpu()
            sums[name] = sums[name] + moment if name in sums else moment

    handles = [
        module.register_forward_hook(partial(watch, name))
        for name, module in model.named_modules()
        if name.endswith(".lora_A.default")
    ]
    try:
        for batch in batches:
            mask[:] = [batch["attention_mask"]]
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        for handle in handles:
            handle.remove()
    return sums
