"""What a comparison of a recipe costs, and the probe that fits into a small share of it.

The unit is one training row, forward and backward. A comparison is counted as `braidlora compare` runs it by default,
without its single-task references and its evaluation, so the probe's share of the real one is smaller than stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from braidlora.config import RunConfig
from braidlora.errors import ConfigError

METHODS = ("lora", "lora-matched", "hydralora", "moelora", "alora")  # the default rows of a comparison
SEEDS = 3
SHARE = 0.05
_FORWARD = 1 / 3  # a forward pass alone, of a forward and a backward pass
_FOR_GRADIENTS = 0.25  # of the probe; the rest trains
_STEPS, _ROWS = (4, 30), (8, 64)  # least and most, of a task
_LEAST_BATCH = 4


@dataclass(frozen=True)
class ProbePlan:
    """The size of a probe.

    Attributes:
        steps: optimizer steps of each task's LoRA.
        batch_size: rows of a step.
        gradient_rows: of each task, for gradients and A x.
        rows: training rows that all this costs.
        comparison_rows: those of a comparison.
    """

    steps: int
    batch_size: int
    gradient_rows: int
    rows: int
    comparison_rows: int

    @property
    def share(self) -> float:
        """Of a comparison's rows."""
        return self.rows / self.comparison_rows


def comparison_rows(config: RunConfig, rows: int) -> int:
    """The training rows that a comparison's runs see, all methods and seeds together.

    Args:
        config: the recipe.
        rows: training rows of all tasks.
    """
    training = config.training
    per_step = training.batch_size * training.gradient_accumulation
    each = training.max_steps * per_step if training.max_steps else training.epochs * rows
    return round(len(METHODS) * SEEDS * each)


def plan_probe(config: RunConfig, rows: Sequence[int], share: float = SHARE) -> ProbePlan:
    """The largest useful probe that costs at most `share` of a comparison.

    Args:
        config: the recipe.
        rows: training rows of each task.
        share: of a comparison, in (0, 1].

    Raises:
        ConfigError: even the smallest probe costs more; the message says how much.
    """
    tasks, total = len(rows), comparison_rows(config, sum(rows))
    of_task = share * total / tasks
    gradient_rows = int(_FOR_GRADIENTS * of_task / (1 + _FORWARD))
    gradient_rows = max(_ROWS[0], min(_ROWS[1], gradient_rows, min(rows)))
    # Smaller batches where the recipe's would leave too few steps: direction needs steps more than rows.
    left = of_task - gradient_rows * (1 + _FORWARD)
    own = config.training.batch_size
    batch_size = min(own, max(_LEAST_BATCH, int(left / _STEPS[0])))
    steps = max(_STEPS[0], min(_STEPS[1], int(left / batch_size)))
    cost = round(tasks * (steps * batch_size + gradient_rows * (1 + _FORWARD)))
    found = ProbePlan(steps, batch_size, gradient_rows, cost, total)
    if found.share > share:
        raise ConfigError(
            f"--budget {share:g}: the smallest probe ({tasks} tasks × {steps} steps) costs {found.share:.1%} of a "
            f"comparison, which for this recipe is only {total:,} training rows. Compare instead (`braidlora "
            f"compare`), or allow it: --budget={_rounded_up(found.share):g}."
        )
    return found


def _rounded_up(share: float) -> float:
    return -(-share // 0.01) / 100
