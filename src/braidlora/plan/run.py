"""`plan`: what a recipe needs, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braidlora.config import FederatedConfig, load_config, schema_of


def plan(recipe: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plan of a train or federated recipe, or, without one, the paper's communication table.

    Raises:
        ConfigError: the recipe is not valid, or its base has no config.json.
    """
    if recipe is None:
        from braidlora.plan.paper import plan_paper

        return plan_paper()
    if schema_of(recipe) is FederatedConfig:
        federated = load_config(recipe, overrides, FederatedConfig)
        from braidlora.plan.federation import plan_federation

        return plan_federation(federated)
    config = load_config(recipe, overrides)  # before the heavy imports, so that a typo shows at once
    from braidlora.plan.train import plan_training

    return plan_training(config)
