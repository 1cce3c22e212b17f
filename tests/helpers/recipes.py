"""Recipes over the tiny base, as plain data or checked."""

from braidlora.config import FederatedConfig, RunConfig
from helpers.tiny_base import TASKS


def training_recipe(base, rows, output, *, kind="generate", **overrides):
    """Three tasks for two epochs; keyword arguments are dotted keys with `__` for the dot."""
    recipe = _recipe(base, rows, output, kind, ("up", "rev", "len"), max_new_tokens=4)
    recipe["adapter"] |= {"num_experts": 2}
    recipe["split"] = {"test": 0.1}
    recipe["training"] = {
        "epochs": 2, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 2, "save_steps": 4, "logging_steps": 3,
    }  # fmt: skip
    return _overridden(recipe, overrides)


def run_config(*args, **options):
    return RunConfig.model_validate(training_recipe(*args, **options))


def federated_recipe(base, rows, output, *, kind="generate", **overrides):
    """Three clients of one task for two rounds; keyword arguments as above, with `federation__` left out."""
    recipe = _recipe(base, rows, output, kind, TASKS, max_new_tokens=3)
    recipe["adapter"] |= {"lora_alpha": 8}
    recipe["split"] = {"test": 0.2}
    recipe["training"] = {"batch_size": 8, "learning_rate": 0.05}
    recipe["federation"] = {"rounds": 2, "evaluate_every": 0}
    return _overridden(recipe, overrides, "federation")


def federated_config(*args, **options):
    return FederatedConfig.model_validate(federated_recipe(*args, **options))


def _recipe(base, rows, output, kind, tasks, max_new_tokens):
    generate = kind == "generate"
    return {
        "model": {"path": str(base)},
        "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
        "tasks": [
            {"name": name, "kind": kind, "train": str(rows / f"{name}{'' if generate else '-labels'}.jsonl")}
            | ({"max_new_tokens": max_new_tokens} if generate else {})
            for name in tasks
        ],
        "prompt": {"cutoff": 24} | ({"template": "{instruction}:{input}->"} if generate else {}),
        "seed": 1,
        "output": str(output),
    }


def _overridden(recipe, overrides, default_section=None):
    for dotted, value in overrides.items():
        path = dotted.split("__")
        if default_section and path[0] not in recipe:
            path.insert(0, default_section)
        node = recipe
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return recipe
