"""From the recipe to transformers' TrainingArguments."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from braidlora.config import RunConfig
from braidlora.errors import ConfigError
from braidlora.training._trainer_compat import use_one_gpu


def training_arguments(config: RunConfig, output: Path, rows: int) -> TrainingArguments:
    """The arguments of one run; "once an epoch" becomes a number of steps, so that every event happens at a step.

    Args:
        config: the recipe.
        output: folder of the checkpoints.
        rows: draws per epoch.

    Raises:
        ConfigError: an optimizer or tracker that is unknown to transformers, or float16 without a GPU.
    """
    training = config.training
    if training.precision == "float16" and not torch.cuda.is_available():
        raise ConfigError("training.precision: float16 needs a GPU; use bfloat16 or float32 on this machine.")
    if training.optimizer not in [str(name.value) for name in transformers.training_args.OptimizerNames]:
        known = ", ".join(str(name.value) for name in transformers.training_args.OptimizerNames)
        raise ConfigError(f"training.optimizer: unknown optimizer {training.optimizer!r}; known are {known}.")
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=config.evaluation.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        use_cpu=not torch.accelerator.is_available(),
        bf16=training.precision == "bfloat16",
        fp16=training.precision == "float16",
        seed=config.seed,
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not finite stops the run instead
        eval_strategy="no",  # the trainer turns it on if there are validation rows
        save_strategy="steps",
        report_to=_trackers(training.report_to),
        disable_tqdm=True,  # we have our own bar
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
    )
    use_one_gpu(arguments)
    batches = math.ceil(math.ceil(rows / training.batch_size) / arguments.world_size)
    per_epoch = math.ceil(batches / training.gradient_accumulation)
    arguments.save_steps = training.save_steps or per_epoch
    arguments.eval_steps = training.eval_steps or per_epoch
    total = training.max_steps or math.ceil(training.epochs * per_epoch)
    if training.warmup_steps >= total and training.scheduler != "constant":
        warnings.warn(
            f"training.warmup_steps is {training.warmup_steps}, but the run has {total} steps: the learning rate never "
            "reaches training.learning_rate; lower warmup_steps",
            stacklevel=2,
        )
    return arguments


def _trackers(names: list[str]) -> list[str]:
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ConfigError(f"training.report_to: unknown tracker {name!r}; known are {known}.")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"training.report_to: {name} is not installed; install it or remove it.")
    return names or ["none"]
