"""Federated recipes: who the clients are, and settings that do not go together."""

import pytest

from braidlora.config import FederatedConfig, dump_config, load_config, schema_of
from braidlora.errors import ConfigError

TASKS = (
    "tasks:\n  - {name: a, train: a.jsonl}\n  - {name: b, train: b.jsonl}\n  - {name: c, train: c.jsonl}\n"
)


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "recipe.yaml"

    def read(federation="federation: {}\n", *overrides, tasks=TASKS):
        path.write_text(tasks + federation, encoding="utf-8")
        return load_config(path, overrides, FederatedConfig)

    return read


def refused(load, *args, **options):
    with pytest.raises(ConfigError) as caught:
        load(*args, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_without_a_list_every_task_is_a_client_of_one_scaling(load):
    config = load("federation: {rule: flora, ranks: [4, 8, 16]}\n", "--adapter.lora_alpha=24")
    assert [(one.name, one.tasks, one.rank, one.alpha) for one in config.clients()] == [
        ("a", ["a"], 4, 12.0), ("b", ["b"], 8, 24.0), ("c", ["c"], 16, 48.0),
    ]  # fmt: skip
    assert {config.scaling_of(one) for one in config.clients()} == {3.0}


def test_rank_stabilised_scaling_is_one_for_all_ranks_too(load):
    config = load("federation: {rule: zero-padding, ranks: [4, 16, 64]}\n", "--adapter.use_rslora=true")
    assert [round(config.scaling_of(one), 12) for one in config.clients()] == [round(16 / 8**0.5, 12)] * 3


def test_clients_of_a_partition_are_numbered(load):
    one_task = "tasks: [{name: a, train: a.jsonl}]\n"
    config = load("federation: {partition: {clients: 12}}\n", tasks=one_task)
    assert [client.name for client in config.clients()][:2] == ["client-01", "client-02"]
    assert load("federation: {partition: {by: column, column: x}}\n", tasks=one_task).clients() is None


def test_the_dump_loads_as_the_same_configuration(load, tmp_path):
    config = load("federation: {rule: fedsa-lora, sample: {number: 2}, robust: {aggregator: median}}\n")
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again, [], FederatedConfig) == config
    assert schema_of(again) is FederatedConfig


def test_a_federated_recipe_is_not_trained_as_another(load, tmp_path):
    load()
    with pytest.raises(ConfigError, match="use `braidlora federate`"):
        load_config(tmp_path / "recipe.yaml")


def test_every_contradiction_is_named_with_its_line(load, tmp_path):
    text = refused(
        load,
        "federation:\n  rule: fedit\n  ranks: [4, 8]\n  state: reset-each-round\n  min_clients: 4\n"
        "  robust: {aggregator: krum, f: 1}\n",
        "--training.epochs=5",
    )
    assert text.startswith("6 problems in the recipe:")
    path = tmp_path / "recipe.yaml"
    for place, words in (
        ("override --training.epochs", "federation.local.epochs sets how long"),
        (f"{path}:7", "2 ranks for 3 clients"),
        (f"{path}:7", "rule fedit needs one rank for all clients, got 4, 8"),
        (f"{path}:8", "no trained factor stays with a client"),
        (f"{path}:9", "got 4, but only 3 clients are sampled"),
        (f"{path}:10", "at least 2f + 3 = 5 clients in a round; 3 are sampled"),
    ):
        assert any(line.strip().startswith(place) and words in line for line in text.splitlines()), words


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rule=local", "state=reset-each-round"], "a client would lose its training"),
        (["rule=ffa-lora", "client_init=independent"], "ffa-lora needs `shared`"),
        (["rule=flora", "optimizer_state=keep"], "starts a new adapter"),
        (["optimizer_state=keep", "state=reset-each-round"], "old moments"),
        (["wire=smallest"], "applies to fed-alora-het"),
        (["r_intermediate=8"], "applies to fed-alora-het"),
        (["share_head=true"], "have no head"),
        (["rule=local", "upload_dtype=float16"], "uploads nothing"),
        (["local={epochs: 1, steps: 3}"], "either epochs or steps"),
        (["sample={}"], "either fraction or number"),
        (["sample={number: 4}"], "only 3 clients"),
        (["share_cap=0.3"], "at least 0.333333"),
        (["robust={aggregator: trimmed-mean}"], "federation.robust.trim: trimmed-mean needs it"),
        (["robust={aggregator: trimmed-mean, trim: 0.5}"], "less than 0.5"),
        (["robust={aggregator: median, f: 1}"], "has no effect on median"),
        (["rule=flora", "robust={aggregator: median}"], "updates of one shape"),
        (["robust={aggregator: median}", "share_cap=0.5"], "gives every client the same weight"),
        (["clients=[{name: x, tasks: [a, d]}]"], "unknown task d; the tasks are a, b, c"),
        (["clients=[{name: x, tasks: [a]}]"], "no client has b, c"),
        (["clients=[{name: x, tasks: [a, b, c]}, {name: X, tasks: [a]}]"], "duplicate client names: x"),
        (["clients=[{name: x, tasks: [a, b, c], rank: 2}]", "ranks=[2]"], "keep one of the two"),
        (["clients=[{name: x, tasks: [a, b, c], alpha: 2}, {name: y, tasks: [a], alpha: 3}]"], "x 0.25, y 0.375"),
        (["partition={clients: 2}"], "name the task to divide"),
        (["partition={task: a, by: dirichlet}"], "needs a number of clients"),
        (["partition={task: a, by: column}"], "needs the name of a column"),
        (["partition={task: a, by: file, clients: 2}"], "one client per file"),
        (["partition={task: a, clients: 2, alpha: 0.1}"], "applies to `by: dirichlet`"),
        (["common_test=[z]"], "unknown task z"),
        (["rule=fed-alra"], "got 'fed-alra'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(load, overrides, words):
    assert words in refused(load, "federation: {}\n", *(f"--federation.{one}" for one in overrides))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--training.save_steps=5", "every round is saved"),
        ("--training.load_best=true", "training.load_best"),
        ("--adapter.num_experts=4", "one plain LoRA without a router"),
        ("--adapter.method=alora", "got 'alora'"),
        ("--adapter.rank_pattern={q_proj: 4}", "one rank and one alpha"),
        ("--split.validation=0.1", "does not use validation rows"),
        ("--evaluation.references={a: 3}", "--local-run RUN"),
    ],
)
def test_what_would_have_no_effect_is_refused(load, override, words):
    assert words in refused(load, "federation: {}\n", override)


def test_true_is_no_number(load):
    said = refused(
        load, "federation: {ranks: [4, true, 4], quorum: false, share_head: true}\n",
        "--adapter.r=true", "--training.learning_rate=true", "--seed=false",
    )  # fmt: skip
    for key, value in (
        ("adapter.r", "True"), ("training.learning_rate", "True"), ("seed", "False"),
        ("federation.ranks", "[4, True, 4]"), ("federation.quorum", "False"),
    ):  # fmt: skip
        assert f"{key}: got {value}; expected a number, not true or false." in said
    assert "5 problems" in said
    assert load("federation: {}\n", "--adapter.use_rslora=true").adapter.use_rslora is True


def test_a_negative_seed_of_a_partition_is_refused(load):
    said = refused(load, "federation: {partition: {task: a, clients: 2, seed: -1}}\n")
    assert "federation.partition.seed: got -1; expected at least 0" in said


def test_settings_of_a_partition_that_would_have_no_effect_are_refused(load):
    said = refused(load, "federation: {partition: {task: a, by: file, min_rows: 5, seed: 3}}\n")
    assert "federation.partition.min_rows: `by: file` uses every file unchanged" in said
    assert "federation.partition.seed: `by: file` draws nothing" in said
