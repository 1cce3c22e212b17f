"""Numbers that would crash a native library, and names that cannot be files, are refused before any work."""

from __future__ import annotations

import types
import typing

import annotated_types
import pytest
from pydantic import BaseModel

from braidlora.config import FederatedConfig, RunConfig, load_config
from braidlora.errors import ConfigError

RECIPE = "tasks:\n  - {name: a, train: a.jsonl}\n  - {name: b, train: b.jsonl}\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def integers(annotation, metadata=()):
    """Metadata of every `int` inside an annotation."""
    if annotation is int:
        yield list(metadata)
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        yield from integers(inner, [*metadata, *more])
    elif origin in (typing.Union, types.UnionType, list, dict):
        for inner in typing.get_args(annotation):
            yield from integers(inner, metadata)


def sections(model):
    yield model
    for field in model.model_fields.values():
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from sections(inner)


def bounds(metadata):
    flat = [one for item in metadata for one in getattr(item, "metadata", [item])]
    upper = [one for one in flat if isinstance(one, annotated_types.Le | annotated_types.Lt)]
    lower = [one for one in flat if isinstance(one, annotated_types.Ge | annotated_types.Gt)]
    return bool(lower), bool(upper)


def test_every_whole_number_of_a_recipe_has_a_lower_and_an_upper_bound():
    seen, without = 0, []
    for root in (RunConfig, FederatedConfig):
        for section in sections(root):
            for name, field in section.model_fields.items():
                for metadata in integers(field.annotation, field.metadata):
                    seen += 1
                    if bounds(metadata) != (True, True):
                        without.append(f"{section.__name__}.{name}")
    assert seen > 40
    assert without == []


@pytest.mark.parametrize(
    "override",
    [
        "training.threads=100000", "training.threads=1025", "adapter.r=100000", "adapter.num_experts=2000",
        "adapter.rank_pattern={q_proj: 100000}", "training.batch_size=100000",
        "evaluation.batch_size=9999999",
        "prompt.cutoff=999999999", "evaluation.num_beams=5000",
        "tasks.a.max_new_tokens=99999999", "seed=4294967296",
        "training.max_steps=99999999999", "tasks.*.train.limit=99999999999999999999",
        "split.seed=1" + "0" * 30,
    ],
)  # fmt: skip
def test_a_number_far_out_is_a_config_error_with_the_bound(recipe, override):
    with pytest.raises(ConfigError, match=r"expected (at most|less than)"):
        load_config(recipe, [override])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 101, "a name of 101 characters becomes a file name; at most 100"),
        ("x" * 300, "a name of 300 characters"),
        ("con", "which Windows reserves for a device"), ("Nul", "device"), ("COM1.x", "device"),
        ("aux.", "drops a final dot"), ("../x", "letters, digits"), ("a/b", "letters, digits"),
        ("é", "letters, digits"), (".a", "letters, digits"),
        ("''", "letters, digits"), ("'a\\n'", "letters, digits"), ('"a\\n"', "letters, digits"),
        ("B", "must differ in more than case: B, b"),
    ],
)  # fmt: skip
def test_a_task_name_that_is_no_file_name_is_refused_by_the_recipe(recipe, name, message):
    with pytest.raises(ConfigError, match=r"tasks") as caught:
        load_config(recipe, [f"tasks.0.name={name}"])
    assert message in str(caught.value)


def test_names_of_ordinary_tasks(recipe):
    for name in ("x" * 100, "ARC-Easy", "glue_qqp", "v1.5", "0", "console", "com10x"):
        load_config(recipe, [f"tasks.0.name='{name}'"])


def test_names_of_clients(recipe):
    recipe.write_text(RECIPE + "federation: {clients: [{name: nul, tasks: [a]}, {name: two, tasks: [b]}]}\n")
    with pytest.raises(ConfigError, match=r"federation\.clients\.0\.name: 'nul' becomes a file name"):
        load_config(recipe, [], FederatedConfig)
    recipe.write_text(
        "tasks: [{name: a, train: a.jsonl}]\nfederation: {partition: {by: column, column: site, min_rows: 1}}\n"
    )
    config = load_config(recipe, [], FederatedConfig)
    for names, message in (
        (["x" * 101, "b"], "101 characters"),
        (["A", "a"], "case"),
        (["con", "b"], "device"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.clients_called(names)
