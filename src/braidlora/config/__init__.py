"""Recipes: read YAML, apply `--dotted.overrides`, and check everything. Imports no torch.

Called by every room but `adapters`, `runs` and `reporting`.
"""

from braidlora.config._data_source import SUFFIXES, DataSource
from braidlora.config._differences import NOTHING, is_default, json_differences, recipe_differences
from braidlora.config._federated import FederatedConfig
from braidlora.config._federation import (
    ClientSection,
    EvaluateSampleSection,
    FederationSection,
    PartitionSection,
    PrivacySection,
    RateScheduleSection,
)
from braidlora.config._load import (
    built_in_recipes,
    dump_config,
    find_recipe,
    load_config,
    override_config,
    schema_of,
)
from braidlora.config._names import name_problem, same_file
from braidlora.config._other_methods import what_it_is
from braidlora.config._schema import (
    AdapterSection,
    EvaluationSection,
    MixingSection,
    ModelSection,
    PromptSection,
    RateMultipliers,
    RunConfig,
    TaskSection,
)
from braidlora.config._suggest import nearest, suggest_key
from braidlora.config._yaml import Document, load_document, parse_scalar

__all__ = [
    "NOTHING",
    "SUFFIXES",
    "AdapterSection",
    "ClientSection",
    "DataSource",
    "Document",
    "EvaluateSampleSection",
    "EvaluationSection",
    "FederatedConfig",
    "FederationSection",
    "MixingSection",
    "ModelSection",
    "PartitionSection",
    "PrivacySection",
    "PromptSection",
    "RateMultipliers",
    "RateScheduleSection",
    "RunConfig",
    "TaskSection",
    "built_in_recipes",
    "dump_config",
    "find_recipe",
    "is_default",
    "json_differences",
    "load_config",
    "load_document",
    "name_problem",
    "nearest",
    "override_config",
    "parse_scalar",
    "recipe_differences",
    "same_file",
    "schema_of",
    "suggest_key",
    "what_it_is",
]
