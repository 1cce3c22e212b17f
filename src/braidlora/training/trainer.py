"""The transformers Trainer for several tasks: their losses, their mixture, their rates, and steps that stop on NaN."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, modeling_utils

from braidlora.adapters import (
    MultiLoraConfig,
    alignment_loss,
    balance_scopes,
    claim_balance_loss,
    collecting,
)
from braidlora.config import RateMultipliers
from braidlora.errors import TrainingError
from braidlora.tasks import Collator, LabelSpace, MixingSampler, MultiTaskDataset
from braidlora.training._trainer_compat import StepHooks
from braidlora.training.finite import REMEDY, all_finite, diagnose, refuse_weights, trainable
from braidlora.training.loss import Losses, TaskMeter, count_targets
from braidlora.training.rates import Factor, parameter_groups
from braidlora.training.stop import StopRequest

_ROWS_SHOWN = 16
_SKIPPED_IN_A_ROW = 30  # from 2¹⁶, where the scale starts, down to 2⁻¹⁴


class MultiTaskTrainer(StepHooks):
    """Trains one adapter on a mixture of tasks.

    The loss of a step is the mean over all its targets, however they are split into accumulated batches or over
    processes. `CheckpointingTrainer` adds checkpoints.

    Args:
        model: a PEFT model.
        arguments: see `training_arguments`.
        train_dataset: encoded training rows.
        validation_dataset: encoded validation rows; without rows there is no validation.
        sampler: the order of the rows.
        collator: rows to batches.
        label_space: for `classify` tasks.
        class_weights: of the labels in each task's loss, (tasks, labels).
        multipliers: of the learning rates of A, B and router.
        other_rounds: factors that other rounds of a federation train.
        stop: checked after every step: whether to save and leave.
        callbacks: further callbacks, e.g. the progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        train_dataset: MultiTaskDataset,
        validation_dataset: MultiTaskDataset | None,
        sampler: MixingSampler,
        collator: Collator,
        *,
        label_space: LabelSpace | None = None,
        class_weights: Tensor | None = None,
        multipliers: RateMultipliers | None = None,
        other_rounds: Collection[Factor] = (),
        load_best: bool = False,
        stop: StopRequest | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if validation_dataset is not None and len(validation_dataset):
            arguments.eval_strategy = "steps"
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train_dataset,
            eval_dataset=validation_dataset,
            data_collator=replace(collator, loss_positions=_keeps_positions(model)),
            callbacks=[_Hooks(self), *(callbacks or [])],
        )
        self.remove_callback(PrinterCallback)
        self.sampler = sampler
        self.task_names = train_dataset.task_names
        self.label_space = label_space
        self.class_weights = None if class_weights is None else class_weights.to(self.args.device)
        self.multipliers, self.other_rounds = multipliers or RateMultipliers(), other_rounds
        self.load_best = load_best
        self.stop = stop or StopRequest()
        self.meter = TaskMeter(len(self.task_names), self.args.device)
        # compute_loss divides by the number of targets of the entire step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self._step_losses: list[Tensor] = []
        self._balance_scopes = balance_scopes(model)
        adapter = getattr(model, "peft_config", {}).get("default")
        self._by_task = isinstance(adapter, MultiLoraConfig) and adapter.by_task
        self._alignment = adapter.alignment_loss if isinstance(adapter, MultiLoraConfig) else 0.0
        self._measure = adapter.alignment if isinstance(adapter, MultiLoraConfig) else "mmd"
        self._skipped_in_a_row = 0
        self._validation_loader: DataLoader[Any] | None = None

    # ---- data

    def train_sampler(self) -> MixingSampler:
        """The recipe's mixture."""
        return self.sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Validation rows, unpacked, the longest first: little padding. Draws nothing from dropout's generator."""
        if eval_dataset is not None or self._validation_loader is None:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            lengths = rows.lengths()
            loader: DataLoader[Any] = DataLoader(
                rows,
                batch_size=self.args.per_device_eval_batch_size,
                sampler=sorted(range(len(rows)), key=lengths.__getitem__, reverse=True),
                collate_fn=replace(self.data_collator, packing=False, pad_to_multiple_of=1),
                generator=torch.Generator(),
            )
            self._validation_loader = self.accelerator.prepare(loader)
        return self._validation_loader

    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        batches = -(-len(self.sampler) // self.args.per_device_train_batch_size)
        batches = -(-batches // self.args.world_size)
        return -(-batches // self.args.gradient_accumulation_steps)

    def tokens_until(self, step: int) -> int:
        """Tokens in the rows of the first `step` optimizer steps, over all processes and without padding."""
        lengths = self.train_dataset.lengths()
        rows = self.args.per_device_train_batch_size * self.args.world_size
        epochs, rest = divmod(step, self.steps_per_epoch())
        taken = [None] * epochs + [rest * rows * self.args.gradient_accumulation_steps]
        return sum(
            lengths[row] for epoch, count in enumerate(taken) for row in self.sampler.indices(epoch)[:count]
        )

    # ---- loss

    def targets_of_step(self, batches: list[Any], device: torch.device) -> Tensor | None:
        """How many targets carry loss in a step, over all processes."""
        if not batches:
            return None
        count = torch.stack([count_targets(batch["labels"]) for batch in batches]).sum().to(device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Summed loss of the batch over the number of targets of the entire step; updates the per-task meter."""
        aligning = self._alignment if model.training else 0.0
        with collecting() if aligning else nullcontext() as parts:
            losses, outputs = self._losses(model, inputs)
        if model.training:
            self.meter.add(losses)
        counted = losses.counted.sum()
        items = counted if num_items_in_batch is None else num_items_in_batch
        loss = losses.values.sum() / items
        if self._balance_scopes and loss.requires_grad:
            loss = claim_balance_loss(self._balance_scopes, loss, counted / items)
        penalty = self.penalty()
        if parts is not None and (apart := self._apart(parts, inputs)) is not None:
            penalty = aligning * apart if penalty is None else penalty + aligning * apart
        if loss.requires_grad and penalty is not None:
            # Its gradient counts once per step, in shares of the targets; the reported loss is that of the rows alone.
            loss = loss + (counted / items) * (penalty - penalty.detach())
        # Gradients are averaged over the processes, and each holds its share of one sum.
        loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def penalty(self) -> Tensor | None:
        """A term of the objective besides the loss of the rows, after a forward pass; None without one."""
        return None

    def _apart(self, parts: list[Tensor], inputs: dict[str, Any]) -> Tensor | None:
        """How far apart the tasks' A x are in this batch; None without two tasks in it."""
        return alignment_loss(parts, inputs["task_id"], inputs["attention_mask"], self._measure)

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Losses, Any]:
        inputs = dict(inputs)
        labels, task_id = inputs.pop("labels"), inputs.pop("task_id")
        positions = inputs.pop("loss_positions", None)
        if positions is not None:
            inputs["logits_to_keep"] = positions
        outputs = model(**inputs, tasks=task_id) if self._by_task else model(**inputs)
        losses = Losses(outputs.logits, labels, task_id, self.label_space, self.class_weights, positions)
        return losses, outputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer's estimate walks all parameters in every step and ignores the adapter."""
        return 0

    # ---- steps that stop on what is not finite

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch; after the last one of a step, loss and gradients must be finite.

        Raises:
            TrainingError: names the tensor, the step and the rows; the optimizer has not stepped.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_losses.append(loss)
        if self.accelerator.sync_gradients:
            losses, self._step_losses = self._step_losses, []
            checks = [torch.isfinite(torch.stack(losses)).all()]
            if self.accelerator.scaler is None:  # which skips such steps itself and lowers its scale
                gradients = [p.grad for _, p in trainable(self.model) if p.grad is not None]
                checks.append(all_finite(gradients))
            if not bool(torch.stack(checks).all()):
                raise diagnose(
                    self.model, losses, self.state.global_step + 1, self._rows_of_step(len(losses))
                )
        return loss

    def refuse_endless_overflow(self) -> None:
        """Count steps that the float16 scaler skipped in succession.

        A few are normal: the scaler starts high and halves its scale until the gradients fit.

        Raises:
            TrainingError: so many that the scale cannot be what overflows.
        """
        if self.accelerator.scaler is None:
            return
        skipped = self.accelerator.optimizer_step_was_skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= _SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"step {self.state.global_step}: {_SKIPPED_IN_A_ROW} steps in a row had a float16 gradient that "
                f"overflows, down to a loss scale of {self.accelerator.scaler.get_scale():g}; these steps changed no "
                f"weights. {REMEDY}"
            )

    def _rows_of_step(self, batches: int) -> list[str]:
        """The rows of this process's batches in the current step, by task."""
        epoch, step = divmod(self.state.global_step, self.steps_per_epoch())
        order = self.sampler.indices(epoch)
        size, world = self.args.per_device_train_batch_size, self.args.world_size
        described = []
        for batch in range(batches):
            number = step * self.args.gradient_accumulation_steps + batch
            start = (number * world + self.args.process_index) * size
            described.append(self._describe(order[start : start + size]))
        return described

    def _describe(self, indices: list[int]) -> str:
        task_ids = self.train_dataset.task_ids
        rows: dict[str, list[int]] = {}
        for index in indices[:_ROWS_SHOWN]:
            task = task_ids[index]
            # Rows are in the tasks' order, so a row's number within its task counts from the task's first row.
            rows.setdefault(self.task_names[task], []).append(index - task_ids.index(task))
        more = f" and {len(indices) - _ROWS_SHOWN} more" if len(indices) > _ROWS_SHOWN else ""
        return "encoded rows " + ", ".join(f"{task} {numbers}" for task, numbers in rows.items()) + more

    # ---- learning rates

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer, its learning rate times the multiplier of each factor."""
        if self.optimizer is None:
            target = self.model if model is None else model
            groups = parameter_groups(
                target, self.multipliers, self.args.learning_rate, self.args.weight_decay,
                set(self.get_decay_parameter_names(target)), self.other_rounds,
            )  # fmt: skip
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def logged_learning_rate(self) -> float:
        """The rate before the factors' multipliers."""
        group = self.optimizer.param_groups[0]
        return float(self.lr_scheduler.get_last_lr()[0] / group["rate_multiplier"])

    # ---- validation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean validation loss per target of every task, and their mean, in which all tasks weigh the same.

        Returns:
            `eval_loss`, and `eval_loss/TASK` for every task that has validation rows.
        """
        names = self.task_names
        sums = torch.zeros(2, len(names), dtype=torch.float64)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for inputs in self.get_eval_dataloader(eval_dataset):
                inputs = self.to_device(inputs)
                with self.compute_loss_context_manager():
                    losses, _ = self._losses(self.model, inputs)
                totals, counts = losses.rows()
                # Drops the rows that pad the last batch of a distributed loader.
                gathered = self.accelerator.gather_for_metrics((inputs["task_id"], totals, counts))
                task_id, totals, counts = (tensor.cpu() for tensor in gathered)
                sums[0].index_add_(0, task_id, totals.double())
                sums[1].index_add_(0, task_id, counts.double())
        self.model.train(training)
        per_task = {
            name: total / count for name, total, count in zip(names, *sums.tolist(), strict=True) if count
        }
        metrics = {f"{metric_key_prefix}_loss": sum(per_task.values()) / len(per_task)}
        metrics |= {f"{metric_key_prefix}_loss/{name}": loss for name, loss in per_task.items()}
        self.log(dict(metrics))
        self.notify_evaluated(metrics)
        return metrics

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether this validation has the lowest mean loss so far; with `load_best` its step is saved."""
        loss = metrics["eval_loss"]
        best = self.state.best_metric is None or loss < self.state.best_metric
        if best:
            self.state.best_metric = loss
            self.state.best_global_step = self.state.global_step
            if self.load_best:
                self.control.should_save = True  # the run can end with the best only if it is on disk
        return best

    # ---- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the per-task training losses to a training log; a skipped float16 step has no gradient norm."""
        if self.accelerator.scaler is not None and "grad_norm" in logs:
            # Without clipping the Trainer takes the norm before the loss scale is divided out.
            known = self.args.max_grad_norm > 0.0 and math.isfinite(logs["grad_norm"])
            logs["grad_norm"] = logs["grad_norm"] if known else None  # type: ignore[assignment]
        if "loss" in logs:
            gather = self._sum_over_processes if self.args.world_size > 1 else None
            per_task = self.meter.read(self.task_names, gather)
            logs |= {f"loss/{name}": loss for name, loss in per_task.items()}
        super().log(logs, start_time)

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")


class _Hooks(TrainerCallback):
    """Events that the Trainer has no method for: the sampler's epoch, weights after a step, a request to stop."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed state has the intervals of the first start; use those of the present recipe.
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.sampler.set_epoch(state.global_step // self.trainer.steps_per_epoch())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        refuse_weights(self.trainer.model, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.refuse_endless_overflow()
        if state.global_step >= state.max_steps:
            control.should_log = True  # include the last steps
            control.should_evaluate = args.eval_strategy != "no"
        stop = self.trainer.stop.signal_number
        if args.world_size > 1:  # a signal may reach one process before the others
            numbers = self.trainer.accelerator.gather(torch.tensor([stop], device=args.device))
            stop = int(numbers.max())
            self.trainer.stop.signal_number = stop
        if stop:
            control.should_save = True
            control.should_training_stop = True


def _keeps_positions(model: nn.Module) -> bool:
    """Whether the model can be asked for the logits of each row's own positions alone.

    With a large vocabulary, the logits of a whole batch may take more time and memory than anything else. Before
    transformers 5.21, and in models with code of their own, positions can only be the same for all rows.
    """
    adapter = getattr(model, "peft_config", {}).get("default")
    if adapter is not None and adapter.is_prompt_learning:  # its virtual tokens shift the positions
        return False
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    own_code = not type(base).__module__.startswith("transformers.")
    if own_code or not hasattr(modeling_utils, "slice_logits_to_keep"):
        return False
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters


@contextlib.contextmanager
def model_restored(model: nn.Module) -> Iterator[None]:
    """Undo what the Trainer leaves on the model, so that answers after training are those of the saved adapter.

    It turns the key-value cache off, and with 16-bit `training.precision` accelerate wraps `forward` in autocast.
    """
    config: Any = model.config
    before = config.use_cache if hasattr(config, "use_cache") else None
    own_forward = vars(model).get("forward")
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before
        if vars(model).pop("_original_forward", None) is not None:
            del vars(model)["forward"]
            if own_forward is not None:
                vars(model)["forward"] = own_forward
