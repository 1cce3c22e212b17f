"""Rows: a user's own, sweeps, and what a sweep keeps fixed."""

import pytest

from braidlora.comparison import Sweep
from braidlora.comparison._matching import trainable_parameters
from braidlora.comparison._plan import Plan
from braidlora.comparison._rows import build_rows
from braidlora.config import load_config, override_config
from braidlora.errors import ConfigError
from braidlora.tasks import load_tasks


@pytest.fixture(scope="module")
def config(recipe):
    return load_config(recipe)


def rows(config, *methods, sweep=None, **own):
    return {row.name: row for row in build_rows(config, methods, own, sweep, load_tasks(config))}


def experts(values, matched="none"):
    return Sweep("adapter.num_experts", values, matched)


def parameters(row, config):
    return trainable_parameters(row.config(config), load_tasks(config))


def test_a_peft_configuration_takes_the_recipes_targets_unless_it_has_its_own(config):
    made = rows(
        config,
        mine={"peft_type": "LOHA", "r": 2},
        other={"peft_type": "LOHA", "target_modules": ["o_proj"]},
        prompt={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
        both={"adapter.method": {"peft_type": "IA3"}, "training.learning_rate": 0.1},
    )
    targets = {name: row.config(config).adapter.method.get("target_modules") for name, row in made.items()}
    assert targets == {
        "mine": ["q_proj", "v_proj"],
        "other": ["o_proj"],
        "prompt": None,
        "both": ["q_proj", "v_proj"],
    }
    assert made["mine"].config(config).adapter.r == 8  # the rest of the section would be refused
    assert made["both"].config(config).training.learning_rate == 0.1


def test_a_row_may_change_any_key_of_the_recipe(config):
    row = rows(config, wide={"adapter.method": "moelora", "adapter.r": 16, "tasks.up.train.limit": 5})["wide"]
    changed = row.config(config)
    assert (changed.adapter.method, changed.adapter.r, changed.tasks[0].train.limit) == ("moelora", 16, 5)


def test_a_sweep_makes_a_row_of_every_value_and_leaves_lora_one_row_where_it_has_no_such_key(config):
    made = rows(config, "lora", "alora", sweep=experts([1, 2, 5]))
    assert list(made) == ["lora", "alora+num_experts=1", "alora+num_experts=2", "alora+num_experts=5"]
    assert made["alora+num_experts=5"].label == "ALoRA, num_experts = 5"
    ranks = rows(config, "lora", "alora", sweep=Sweep("adapter.r", [2, 4]))
    assert list(ranks) == ["lora+r=2", "lora+r=4", "alora+r=2", "alora+r=4"]


@pytest.mark.parametrize("method", ["alora", "hydralora", "moelora"])
def test_matched_in_parameters_each_value_comes_as_near_as_a_whole_rank_can(config, method):
    wide = override_config(config, {"adapter.r": 12})
    tasks = load_tasks(wide)
    wanted = trainable_parameters(override_config(wide, {"adapter.method": method}), tasks)
    for row in rows(wide, method, sweep=experts([1, 3, 8], "parameters")).values():
        found = row.config(wide)
        assert found.adapter.lora_alpha / found.adapter.r == pytest.approx(16 / 12)
        error = abs(parameters(row, wide) - wanted)
        for rank in (found.adapter.r - 1, found.adapter.r + 1):
            if rank > 0:
                neighbour = override_config(found, {"adapter.r": rank})
                assert error <= abs(trainable_parameters(neighbour, tasks) - wanted)


def test_a_single_task_without_validation_rows_has_no_best_checkpoint_to_load(config, tmp_path):
    """`load_best` needs some, and one task's are enough for the recipe."""
    folder = tmp_path / "out"
    best = override_config(
        config, {"split.validation": 0.0, "training.load_best": False, "output": str(folder)}
    )
    best = override_config(
        best, {"tasks.up.validation": best.tasks[0].train.source, "training.load_best": True}
    )
    plan = Plan(best, folder, [0], {})
    loads = {task.name: plan.single(task, {})[0].config.training.load_best for task in load_tasks(best)}
    assert loads == {"up": True, "rev": False, "len": False}


def test_matched_in_rank_experts_times_rank_is_the_recipes(config):
    wide = override_config(config, {"adapter.r": 6, "adapter.use_rslora": True})
    made = rows(wide, "alora", sweep=experts([1, 2, 4, 5], "rank"))
    sections = [row.config(wide).adapter for row in made.values()]
    assert [(one.num_experts, one.r) for one in sections] == [(1, 12), (2, 6), (4, 3), (5, 2)]
    assert all(one.lora_alpha / one.r**0.5 == pytest.approx(16 / 6**0.5) for one in sections)
    assert made["alora+num_experts=4"].label == "ALoRA, num_experts = 4, r = 3"


def test_parameters_are_counted_as_training_counts_them(config, recipe):
    """q_proj (64 → 64) and v_proj (64 → 32) of two layers: two A of rank 4 and a router of two rows, one B."""
    alora = override_config(config, {"adapter.method": "alora"})
    assert trainable_parameters(alora, load_tasks(config)) == 2 * (2 * (8 + 2) * 64 + (64 + 32) * 4)


@pytest.mark.parametrize(
    ("overrides", "methods", "sweep", "said"),
    [
        ({"adapter.rank_pattern": {"q_proj": 2}}, ["lora-matched"], None, "Leave out `lora-matched`"),
        ({"adapter.alpha_pattern": {"q_proj": 2}}, ["alora"], experts([1], "parameters"), "--matched none"),
        ({}, ["alora"], Sweep("adapter.method", ["lora"]), "sets this key itself"),
        ({}, ["alora"], experts([0]), "adapter.num_experts: got 0"),
        ({}, ["alora"], Sweep("adapter.lora_alpha", [8], "parameters"), "use --matched none"),
        ({}, ["alora"], experts([2, 2]), "given twice"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(config, overrides, methods, sweep, said):
    with pytest.raises(ConfigError, match=said):
        rows(override_config(config, overrides), *methods, sweep=sweep)
