"""A client's training in a round: some epochs or steps on its own rows, with the same Trainer as `train`."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import set_seed

from braidlora.config import FederatedConfig, RunConfig
from braidlora.errors import ConfigError
from braidlora.federated.protocol.client import Trained
from braidlora.federated.protocol.factors import split
from braidlora.federated.protocol.schedule import learning_rate
from braidlora.federated.site.clients import Client
from braidlora.federated.site.group import Group
from braidlora.tasks import Collator, MixingSampler
from braidlora.tasks.class_weights import class_weights
from braidlora.training.arguments import training_arguments
from braidlora.training.failures import explain_step_out_of_memory
from braidlora.training.finite import trainable
from braidlora.training.rates import Factor, factor_of
from braidlora.training.trainer import MultiTaskTrainer, model_restored

if TYPE_CHECKING:
    from braidlora.federated.site.host import Host


class ClientTrainer(MultiTaskTrainer):
    """A `MultiTaskTrainer` that saves nothing, and whose optimizer and schedule may continue from an earlier round.

    Args:
        rounds: how many rounds the schedule spans; 1 if it restarts in each.
        before: rounds of the schedule that are done.
        optimizer_state: of the last round, by `KEY/TENSOR`.
        names: the parameters by the names of their tensors.
        proximal_mu: μ of FedProx.
        pulled: the parameters that FedProx pulls back to where they are now.
        group: the processes that train together.
    """

    def __init__(
        self,
        *args: Any,
        rounds: int,
        before: int,
        optimizer_state: Mapping[str, Tensor],
        names: Mapping[str, torch.nn.Parameter],
        proximal_mu: float = 0.0,
        pulled: Sequence[torch.nn.Parameter] = (),
        group: Group | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._proximal_mu = proximal_mu
        self._pulled = [(one, one.detach().clone()) for one in pulled] if proximal_mu else []
        self.rounds, self.before = rounds, before
        self.names = names
        self.losses: dict[str, float] = {}
        self._optimizer_state = optimizer_state
        self._group = group

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As of all tasks; in a group, gradients are averaged after the backward pass, and errors are shared.

        DDP would average them during the backward pass, where a process that runs out of memory leaves the others
        waiting.
        """
        if self._group is None:
            return super().training_step(model, inputs, num_items_in_batch)
        with self._group.together(), self.accelerator.no_sync(model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._group.average(one for _, one in trainable(self.model))
        return loss

    def penalty(self) -> Tensor | None:
        """μ/2 ‖θ − θ_t‖² over the factors that the client was sent as θ_t (FedProx, arXiv 1812.06127)."""
        if not self._pulled:
            return None
        squares = [(one - start).float().square().sum() for one, start in self._pulled]
        return 0.5 * self._proximal_mu * torch.stack(squares).sum()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's optimizer, with the moments of an earlier round."""
        optimizer = super().create_optimizer(model)
        for name, tensor in self._optimizer_state.items():
            key, _, parameter = name.partition("/")
            optimizer.state[self.names[parameter]][key] = tensor.clone()
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The recipe's schedule over all rounds, advanced to this one."""
        scheduler = super().create_scheduler(num_training_steps * self.rounds, optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
            for _ in range(num_training_steps * self.before):
                scheduler.step()
        return scheduler

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's state as `KEY/TENSOR`, e.g. `exp_avg/….lora_A.weight`."""
        state = {}
        for name, parameter in self.names.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    raise ConfigError(
                        f"federation.optimizer_state: {self.args.optim} keeps {key} = {value!r}, which is not a "
                        "tensor; use `restart`, or training.optimizer=adamw_torch."
                    )
                state[f"{key}/{name}"] = value.detach().cpu().clone()
        return state

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        self.losses |= {
            key.removeprefix("loss/"): value for key, value in logs.items() if key.startswith("loss/")
        }


def local_config(config: FederatedConfig, seed: int, round: int) -> RunConfig:
    """The recipe of one client's training in one round."""
    local = config.federation.local
    training = config.training.model_copy(
        update={
            "epochs": local.epochs or 1.0,
            "max_steps": local.steps,
            "logging_steps": 10**9,
            "learning_rate": learning_rate(config, round),
        }
    )
    return config.model_copy(update={"training": training, "seed": seed})


def train_locally(
    host: Host, client: Client, round: int, seed: int, optimizer_state: Mapping[str, Tensor]
) -> Trained:
    """Train the host's active adapter on the client's rows.

    Args:
        round: its number, from 1; it sets the learning rate and, if the optimizer is kept, the schedule's position.
        seed: of the round's row order and dropout masks.
        optimizer_state: of the client's last round; empty if the optimizer restarts.

    Raises:
        TrainingError: a loss, gradient or weight is not finite, or memory ran out.
    """
    federation = host.config.federation
    keep = federation.optimizer_state == "keep"
    config, rows = local_config(host.config, seed, round), host.rows(client)
    sampler = MixingSampler(rows, config.mixing, seed)
    with tempfile.TemporaryDirectory() as unused:
        with warnings.catch_warnings():
            # It counts the steps of one round only.
            warnings.filterwarnings("ignore", "training.warmup_steps is")
            arguments = training_arguments(config, Path(unused), len(sampler))
        arguments.save_strategy = "no"
        arguments.ddp_broadcast_buffers = False  # they never change, and a failed process would not take part
        trainer = ClientTrainer(
            host.model,
            arguments,
            rows,
            None,
            sampler,
            Collator(
                host.tokenizer.pad_token_id,
                config.kind,
                packing=config.prompt.packing,
                cutoff=config.prompt.cutoff,
            ),
            label_space=host.label_space,
            class_weights=class_weights(host.config, client.tasks, host.label_space),
            multipliers=config.training.rate_multipliers,
            other_rounds=_in_other_rounds(host),
            rounds=federation.rounds if keep else 1,
            before=round - 1 if keep else 0,
            optimizer_state=optimizer_state,
            names=host.parameters(),
            proximal_mu=federation.proximal_mu,
            pulled=_pulled(host),
            group=host.group,
        )
        set_seed(seed)
        if round == 1:
            _warn_of_warmup(config, trainer, client.name)
        with model_restored(host.model), explain_step_out_of_memory():
            output = trainer.train()
    host.model.eval()
    return Trained(
        loss=float(output.training_loss),
        losses=trainer.losses,
        steps=int(output.global_step),
        optimizer=trainer.optimizer_state() if keep else {},
    )


def _in_other_rounds(host: Host) -> set[Factor]:
    """The factors that a rule that alternates trains in its other turns."""
    spec = host.rule.spec
    return {factor_of(name) for name in host.parameters() if spec.turns and split(name)[1] in spec.trains}


def _pulled(host: Host) -> list[torch.nn.Parameter]:
    """The trained parameters that all clients were sent."""
    rule = host.rule
    return [
        parameter
        for name, parameter in host.parameters().items()
        if parameter.requires_grad and (split(name)[1] in rule.spec.pulled or name in rule.also_share)
    ]


def _warn_of_warmup(config: RunConfig, trainer: ClientTrainer, client: str) -> None:
    training = config.training
    steps = training.max_steps or math.ceil(training.epochs * trainer.steps_per_epoch())
    total = steps * trainer.rounds
    if training.warmup_steps >= total and training.scheduler != "constant":
        spans = "all rounds" if trainer.rounds > 1 else "a round"
        warnings.warn(
            f"training.warmup_steps is {training.warmup_steps}, but client {client} has {total} steps in {spans}: the "
            "learning rate never reaches training.learning_rate; lower warmup_steps",
            stacklevel=2,
        )
