"""What a client's adapter says of itself, and how a federation knows its labels and its base again."""

import json
import shutil

import pytest

import braidlora.federated.simulation.driver as local
from braidlora.config import dump_config
from braidlora.errors import CheckpointError, ConfigError, DataError
from braidlora.evaluation.run import evaluate
from braidlora.export.run import export
from braidlora.federated.simulation.add_client import add_client
from braidlora.federated.simulation.driver import federate
from braidlora.federated.simulation.final import final_models
from braidlora.models.base import load_base
from braidlora.models.old_fingerprints import sampled_fingerprint
from braidlora.models.stored_weights import stored_fingerprint
from braidlora.runs import ADAPTER_CARD, MANIFEST, commit_directory, read_adapter_card
from braidlora.tasks import LabelSpace


def classify(make_config, **overrides):
    return make_config(kind="classify", rule="fed-alora", rounds=1, **overrides)


def with_options(config, options):
    tasks = [task.model_copy(update={"options": options}) for task in config.tasks]
    return config.model_copy(update={"tasks": tasks})


def without_card(adapter, directory):
    """An adapter as braidlora 0.1 left it: no card, and nothing that vouches for the directory as a whole."""
    with commit_directory(adapter.with_name("again")) as staging:
        for path in adapter.iterdir():
            if path.name not in (ADAPTER_CARD, MANIFEST):
                shutil.copy(path, staging)
    shutil.rmtree(adapter)
    adapter.with_name("again").rename(adapter)
    (directory / MANIFEST).unlink()


def test_every_clients_adapter_says_what_it_means(make_config, tiny_base, tmp_path):
    config = with_options(classify(make_config), ["yes", "no"])
    run = federate(config, progress=False).directory
    for name in ("len", "rev", "up"):
        card = read_adapter_card(run / "clients" / name / "adapter")
        assert card.labels == ["yes", "no"]
        assert card.task_labels == {name: ["yes", "no"] for name in ("up", "rev", "len")}
        assert card.base.fingerprint == stored_fingerprint(tiny_base)
    assert json.loads((run / "experiment.json").read_text())["base"]["fingerprint"] == stored_fingerprint(
        tiny_base
    )
    # Away from its federation, with the options in another order: the same answers.
    away = shutil.copytree(run / "clients" / "up" / "adapter", tmp_path / "away")
    scores = [
        evaluate(away, with_options(config, options), directory=tmp_path / options[0], progress=False)["mean"]
        for options in (["yes", "no"], ["no", "yes"])
    ]
    assert scores[0] == scores[1]
    export(run / "clients" / "up", tmp_path / "lora")
    assert read_adapter_card(tmp_path / "lora") == read_adapter_card(away)
    # As braidlora 0.1 left it, the federation's own record is read.
    old = run / "clients" / "up" / "adapter"
    without_card(old, run)
    export(run / "clients" / "up", tmp_path / "old")
    assert read_adapter_card(tmp_path / "old").labels == ["yes", "no"]
    swapped = with_options(config, ["no", "yes"])
    assert evaluate(old, swapped, directory=tmp_path / "in place", progress=False)["mean"] == scores[0]


def test_a_generating_clients_card_names_its_own_tasks(make_config):
    run = federate(make_config(rule="fedit", rounds=1), progress=False).directory
    card = read_adapter_card(run / "clients" / "rev" / "adapter")
    assert ([(task.name, task.kind) for task in card.tasks], card.labels) == ([("rev", "generate")], None)


# The client's new training rows lack the label of the task's own test rows.
@pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")
def test_a_client_that_joins_has_the_federations_labels(make_config, tmp_path):
    config = with_options(classify(make_config), ["yes", "no"])
    run = federate(config, progress=False).directory
    rows = tmp_path / "new.jsonl"
    rows.write_text('{"text": "up a", "label": "yes"}\n{"text": "up b", "label": "no"}\n' * 4)
    swapped = [f"tasks.{number}.options=[no, yes]" for number in range(3)]
    add_client(run, "new", tasks=["up"], train=str(rows), overrides=swapped, epochs=1)
    assert read_adapter_card(run / "clients" / "new" / "adapter").labels == ["yes", "no"]
    with pytest.raises(ConfigError, match=r"task up: .* has the labels 'yes', 'no'; .* 'maybe'"):
        add_client(run, "other", tasks=["up"], overrides=["tasks.0.options=[no, yes, maybe]",
                                                         "tasks.1.options=[no, yes, maybe]",
                                                         "tasks.2.options=[no, yes, maybe]"])  # fmt: skip
    rows.write_text('{"text": "up a", "label": "maybe"}\n{"text": "up b", "label": "no"}\n' * 4)
    none = [f"tasks.{number}.options=null" for number in range(3)]
    with pytest.raises(DataError, match=r"'maybe'"):
        add_client(run, "other", tasks=["up"], train=str(rows), overrides=none)
    assert not (run / "clients" / "other").exists()
    # The finished clients' models as well are read with the federation's labels, whatever the overrides list.
    assert {
        host.label_space.names[0] for _, host in final_models(local.FederatedDirectory(run), swapped)
    } == {"yes"}


def test_a_resume_with_other_labels_is_refused(make_config):
    config = classify(make_config)
    run = federate(config, progress=False).directory
    longer = config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": 2})})
    (run / MANIFEST).unlink()
    experiment = json.loads((run / "experiment.json").read_text())
    del experiment["labels"]  # as braidlora 0.1 wrote it: the labels stand in a file of their own
    (run / "experiment.json").write_text(json.dumps(experiment))
    (run / "labels.json").write_text(
        LabelSpace({name: ["yes", "no"] for name in ("len", "rev", "up")}).to_json()
    )
    with pytest.raises(CheckpointError, match=r"labels of the head: yes, no then, no, yes now"):
        federate(longer, resume="auto", progress=False)


def test_a_federation_of_0_1_is_carried_on_with(make_config, tiny_base, monkeypatch):
    """Its record of the base has sixteen digits, of which its id was made as well."""
    config = make_config(rule="fedit", rounds=1)
    with monkeypatch.context() as patch:
        patch.setattr(local, "experiment_id", lambda identity: "0123456789abcdef")
        run = federate(config, progress=False).directory
    base, _ = load_base(config.model)
    path = run / "experiment.json"
    record = json.loads(path.read_text())
    (run / MANIFEST).unlink()
    path.write_text(json.dumps(record | {"base": sampled_fingerprint(base)}))
    longer = config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": 2})})
    assert federate(longer, resume="auto", progress=False).metrics["rounds"] == 2
    again = json.loads(path.read_text())
    assert (again["id"], again["base"]["fingerprint"]) == ("0123456789abcdef", stored_fingerprint(tiny_base))


def test_a_federation_on_another_base_is_refused_though_one_weight_alone_differs(
    make_config, tiny_base, tmp_path
):
    config = make_config(rule="fedit", rounds=1)
    run = federate(config, progress=False).directory
    other = shutil.copytree(tiny_base, tmp_path / "other")
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (other / "model.safetensors").write_bytes(content)
    model = config.model.model_copy(update={"path": str(other)})
    federation = config.federation.model_copy(update={"rounds": 2})
    with pytest.raises(CheckpointError, match=r"base model: .*sha256:.* then, .*sha256:.* now"):
        federate(
            config.model_copy(update={"model": model, "federation": federation}),
            resume="auto",
            progress=False,
        )
    with pytest.raises(CheckpointError, match="trained on a different base model"):
        next(final_models(local.FederatedDirectory(run), [f"model.path={other}"]))
    (tmp_path / "recipe.yaml").write_text(dump_config(config))
    with pytest.raises(CheckpointError, match="trained on a different base model"):
        export(run / "clients" / "up", tmp_path / "merged", merge=True, base=str(other))
