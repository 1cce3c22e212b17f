"""Recipes: YAML in, `--dotted.overrides` on top, one checked configuration out. Imports no torch."""

from braidlora.config._load import built_in_recipes, dump_config, find_recipe, load_config, override_config
from braidlora.config._schema import (
    AdapterSection,
    DataSource,
    EvaluationSection,
    MixingSection,
    ModelSection,
    PromptSection,
    RateMultipliers,
    RunConfig,
    SplitSection,
    TaskSection,
    TrainingSection,
)
from braidlora.config._yaml import parse_scalar

__all__ = [
    "AdapterSection",
    "DataSource",
    "EvaluationSection",
    "MixingSection",
    "ModelSection",
    "PromptSection",
    "RateMultipliers",
    "RunConfig",
    "SplitSection",
    "TaskSection",
    "TrainingSection",
    "built_in_recipes",
    "dump_config",
    "find_recipe",
    "load_config",
    "override_config",
    "parse_scalar",
]
