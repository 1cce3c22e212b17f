"""The rank at which an adapter has as many trainable parameters as another, counted on a base without weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from braidlora.config import RunConfig, override_config
from braidlora.errors import ConfigError
from braidlora.tasks import LabelSpace, Task


def trainable_parameters(config: RunConfig, tasks: Sequence[Task]) -> int:
    """How many parameters the recipe's adapter trains, including a classifier's head. No weights are read or created.

    Raises:
        ConfigError: the base has no configuration, or the adapter does not fit it.
    """
    import torch

    from braidlora.models.attach import attach_adapter
    from braidlora.models.location import base_source
    from braidlora.models.skeleton import skeleton

    labels = len(LabelSpace.of(tasks).names) if config.kind == "classify" else None
    source, revision = base_source(config.model), config.model.revision
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # training gives these warnings
        base = skeleton(source, config.kind, num_labels=labels, revision=revision)
        model = attach_adapter(base, config, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def matched_rank(config: RunConfig, parameters: int, tasks: Sequence[Task]) -> dict[str, Any]:
    """Overrides of rank and alpha that bring the recipe's adapter as close to `parameters` as an integer rank can.

    The scaling (alpha / r, with `use_rslora` alpha / √r) stays the same, so that learning rates stay comparable.

    Raises:
        ConfigError: the recipe sets ranks or alphas per module, so no single rank matches.
    """
    adapter = config.adapter
    if adapter.rank_pattern or adapter.alpha_pattern:
        raise ConfigError(
            "adapter.rank_pattern and adapter.alpha_pattern set ranks and scalings per module, so no single rank "
            "matches. Leave out `lora-matched` (--methods), or use --matched none."
        )
    one, two = (trainable_parameters(override_config(config, {"adapter.r": rank}), tasks) for rank in (1, 2))
    rank = max(1, round((parameters - one) / (two - one)) + 1)  # the count is linear in the rank
    return at_rank(config, rank)


def at_rank(config: RunConfig, rank: int) -> dict[str, Any]:
    """Overrides that set another rank and keep the scaling."""
    ratio = rank / config.adapter.r
    alpha = config.adapter.lora_alpha * (math.sqrt(ratio) if config.adapter.use_rslora else ratio)
    return {"adapter.r": rank, "adapter.lora_alpha": alpha}
