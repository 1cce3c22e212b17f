"""Which logit is which label travels with an adapter: another order is read by name, another set is refused."""

import json
import shutil
import warnings

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from braidlora.cli import main
from braidlora.config import ModelSection, dump_config
from braidlora.errors import CheckpointError, ConfigError, DataError
from braidlora.evaluation.run import evaluate, evaluate_tasks
from braidlora.export.run import export
from braidlora.models.base import load_base
from braidlora.models.loading import load_for_evaluation
from braidlora.models.stored_weights import stored_fingerprint
from braidlora.one_run import train
from braidlora.runs import ADAPTER_CARD, MANIFEST, RunDirectory, commit_directory, read_adapter_card
from braidlora.tasks import LabelSpace
from braidlora.training.checkpoint import Checkpoint, check_labels

COLOURS = {"red": "ab", "blue": "cd", "green": "ef"}
TEXTS = {letter * n: label for label, letters in COLOURS.items() for letter in letters for n in (1, 2, 3)}
ORDERS = [["red", "blue", "green"], ["green", "red", "blue"], ["blue", "green", "red"]]


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    rows = [
        {"text": letter * n, "label": label}
        for label, letters in COLOURS.items()
        for letter in letters
        for n in (1, 2, 3)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.fixture
def recipe(make_config, colours):
    """A recipe of one task with its options in some order; None lets them be found in the rows."""

    def make(options, output="run", rows=colours, **overrides):
        task = {
            "name": "colour", "kind": "classify", "train": str(rows), "test": str(rows), "options": options,
            "metric": "accuracy",
        }  # fmt: skip
        settings = {"split": {}, "adapter__lora_dropout": 0.0, "training__epochs": 8} | overrides
        return make_config(output, kind="classify", tasks=[task], **settings)

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(trained, recipe, tmp_path):
    """A trained run in the first order, a copy of it, and its score."""
    if not trained.exists():
        train(recipe(ORDERS[0]).model_copy(update={"output": str(trained)}), progress=False)
    shutil.copytree(trained, tmp_path / "run")
    return RunDirectory(tmp_path / "run"), json.loads((trained / "metrics.json").read_text())["mean"]


def answers(folder):
    return [
        json.loads(line)["prediction"]
        for line in (folder / "predictions" / "colour.jsonl").read_text().splitlines()
    ]


def quietly(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*args, **options)


def without_card(adapter, directory):
    """An adapter as braidlora 0.1 left it: no card, and nothing that vouches for the directory as a whole."""
    with commit_directory(adapter.with_name("again")) as staging:
        for path in adapter.iterdir():
            if path.name not in (ADAPTER_CARD, MANIFEST):
                shutil.copy(path, staging)
    shutil.rmtree(adapter)
    adapter.with_name("again").rename(adapter)
    (directory / MANIFEST).unlink()


def test_every_adapter_folder_of_a_run_says_what_it_means(run, tiny_base):
    directory, score = run
    assert score > 60
    folders = [
        directory.adapter,
        directory.adapter_init,
        directory.checkpoint(directory.checkpoint_steps()[-1]),
    ]
    cards = [read_adapter_card(folder) for folder in folders]
    assert cards[0] == cards[1] == cards[2]
    [task] = cards[0].tasks
    assert (task.name, task.labels, task.indices, cards[0].labels) == (
        "colour",
        ORDERS[0],
        [0, 1, 2],
        ORDERS[0],
    )
    assert cards[0].base.fingerprint == stored_fingerprint(tiny_base)
    assert (cards[0].base.dtype, cards[0].base.quantization) == ("float32", "none")
    for folder in folders:
        assert ADAPTER_CARD in json.loads((folder / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("options", [*ORDERS, None])
def test_another_order_is_answered_by_name_to_the_bit(options, run, recipe, tmp_path):
    directory, score = run
    away = shutil.copytree(directory.adapter, tmp_path / "away")
    metrics = quietly(evaluate, away, recipe(options), directory=tmp_path / "out", progress=False)
    assert metrics["mean"] == score
    assert answers(tmp_path / "out") == answers(directory.path)
    here = load_for_evaluation(directory.path)
    there = load_for_evaluation(away, recipe(options))
    ids = torch.tensor([[9, 10, 11]])
    assert torch.equal(here.model(input_ids=ids).logits, there.model(input_ids=ids).logits)
    assert there.model.config.id2label == dict(enumerate(ORDERS[0]))
    # In its run as well, where the run's recipe is overruled.
    assert (
        quietly(evaluate, directory.path, recipe(options), directory=tmp_path / "in", progress=False)["mean"]
        == score
    )


@pytest.mark.parametrize(
    ("options", "there", "kind", "said"),
    [
        (
            ["red", "blue"],
            ["red", "blue"],
            ConfigError,
            r"has the labels 'red', 'blue', 'green'; .*'red', 'blue'\.",
        ),
        (["red", "blue", "green", "pink"], ["red"], ConfigError, "'green', 'pink'"),
        (["red", "blue", "pink"], ["red", "blue"], ConfigError, "'red', 'blue', 'pink'"),
        (
            None,
            ["red", "pink"],
            DataError,
            r"the recipe has 'pink', 'red'\. Rows labeled 'pink' cannot be predicted",
        ),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_another_set_of_labels_is_refused_with_both_sides(
    options, there, kind, said, inside, run, recipe, tmp_path
):
    directory, _ = run
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps({"text": "ab", "label": label}) + "\n" for label in there * 3))
    target = directory.path if inside else shutil.copytree(directory.adapter, tmp_path / "away")
    with pytest.raises(kind, match=said):
        evaluate(target, recipe(options, rows=file), progress=False)


def test_rows_that_hold_some_of_the_labels_are_answered(run, recipe, tmp_path):
    directory, _ = run
    file = tmp_path / "some.jsonl"
    rows = [("e", "green"), ("a", "red")]
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    away = shutil.copytree(directory.adapter, tmp_path / "away")
    evaluate(away, recipe(None, rows=file), directory=tmp_path / "out", progress=False)
    by_text = dict(zip(TEXTS, answers(directory.path), strict=True))
    assert answers(tmp_path / "out") == [by_text["e"], by_text["a"]]


def test_without_a_card_the_runs_labels_count_and_without_both_it_is_said(run, recipe, tmp_path):
    """Adapters of braidlora 0.1."""
    directory, score = run
    without_card(directory.adapter, directory.path)
    assert (
        quietly(evaluate, directory.path, recipe(ORDERS[1]), directory=tmp_path / "a", progress=False)["mean"]
        == score
    )
    away = shutil.copytree(directory.adapter, tmp_path / "away")
    with pytest.warns(
        UserWarning, match=r"order of its labels .*assuming 'red', 'blue', 'green', as in the recipe"
    ):
        assert evaluate(away, recipe(ORDERS[0]), directory=tmp_path / "b", progress=False)["mean"] == score


def test_a_card_that_contradicts_its_run_is_refused(run):
    directory, _ = run
    (directory.path / MANIFEST).unlink()
    directory.labels.write_text(LabelSpace({"colour": ORDERS[1]}).to_json())
    with pytest.raises(
        CheckpointError, match=r"'red', 'blue', 'green', and .*labels.json has 'green', 'red', 'blue'"
    ):
        evaluate(directory.path, progress=False)


def test_a_damaged_card_ends_with_5_and_no_traceback(run, recipe, tmp_path, capsys):
    directory, _ = run
    away = shutil.copytree(directory.adapter, tmp_path / "away")
    (away / "manifest.json").unlink()
    card = json.loads((away / ADAPTER_CARD).read_text())
    (tmp_path / "recipe.yaml").write_text(dump_config(recipe(ORDERS[0])))
    for text, said in (
        (json.dumps(card | {"format_version": 99}), "format_version 99"),
        (json.dumps(card | {"labels": ["red", "green", "blue"]}), "do not match those of the logits"),
        ("{", "not readable as JSON"),
    ):
        (away / ADAPTER_CARD).write_text(text)
        for call in (
            ["evaluate", str(away), "--recipe", str(tmp_path / "recipe.yaml")],
            ["export", str(away), "--no-scores", "--static-weights", "uniform"],
        ):
            assert main(call) == 5
            assert said in capsys.readouterr().err


def test_another_kind_of_task_is_refused(run, make_config, tmp_path):
    directory, _ = run
    away = shutil.copytree(directory.adapter, tmp_path / "away")
    with pytest.raises(ConfigError, match=r"was trained on classify tasks, and the recipe has generate"):
        evaluate(away, make_config("other"), progress=False)


def test_a_resume_with_the_labels_in_another_order_is_refused(run, recipe):
    directory, _ = run
    with pytest.raises(CheckpointError, match=r"tasks\.0\.options"):
        train(recipe(ORDERS[1]), resume="auto", progress=False)
    checkpoint = directory.checkpoint(directory.checkpoint_steps()[-1])
    card = read_adapter_card(checkpoint)
    other = LabelSpace({"colour": ORDERS[1]})
    with commit_directory(directory.path / "other") as staging:
        card.model_copy(update={"tasks": other.cards(), "labels": other.names}).write(staging)
    checkpoint = Checkpoint(directory.path / "other")
    check_labels(checkpoint, other)
    with pytest.raises(
        CheckpointError, match=r"labels 'green', 'red', 'blue', in this order; this run's are 'red'"
    ):
        check_labels(checkpoint, LabelSpace({"colour": ORDERS[0]}))


@pytest.mark.parametrize("around", [True, False])
def test_an_export_carries_the_labels(around, run, recipe, tmp_path):
    directory, _ = run
    source = directory.adapter if around else shutil.copytree(directory.adapter, tmp_path / "away")
    export(source, tmp_path / "lora", static_weights="uniform", score=False)
    card = read_adapter_card(tmp_path / "lora")
    assert card == read_adapter_card(directory.adapter)
    first = quietly(evaluate, tmp_path / "lora", recipe(ORDERS[0]), directory=tmp_path / "0", progress=False)
    for number, options in enumerate(ORDERS[1:], 1):
        place = tmp_path / str(number)
        assert quietly(evaluate, tmp_path / "lora", recipe(options), directory=place, progress=False) == first


def test_a_merged_classifier_is_read_by_name_too(run, recipe, tmp_path):
    """Its labels stand in config.json, where transformers has them; a base of any origin is read that way."""
    directory, _ = run
    away = shutil.copytree(directory.adapter, tmp_path / "away")
    export(
        away, tmp_path / "merged", static_weights="uniform", merge=True, score=False
    )  # no recipe: the card has all
    card = read_adapter_card(tmp_path / "merged")
    assert (card.labels, card.base) == (ORDERS[0], None)
    results = []
    for number, options in enumerate(ORDERS):
        config = recipe(options, model__path=str(tmp_path / "merged"))
        place = tmp_path / str(number)
        results.append(quietly(evaluate, tmp_path / "merged", config, directory=place, progress=False))
        assert answers(place) == answers(tmp_path / "0")
    assert results[0] == results[1] == results[2]
    some = tmp_path / "some.jsonl"
    some.write_text('{"text": "a", "label": "red"}\n{"text": "c", "label": "blue"}\n' * 3)
    with pytest.raises(
        ConfigError, match=r"for the labels 'red', 'blue', 'green'; the recipe's are 'blue', 'red'"
    ):
        evaluate(tmp_path / "merged", recipe(["blue", "red"], rows=some), progress=False)


def test_an_adapter_on_another_base_is_refused_without_its_run(run, recipe, tiny_base, tmp_path):
    directory, _ = run
    away = shutil.copytree(directory.adapter, tmp_path / "away")
    other = shutil.copytree(tiny_base, tmp_path / "other")
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"(?s)trained on a different base model.*sha256:.*--model\.path=PATH"
    ):
        evaluate(away, recipe(ORDERS[0], model__path=str(other)), progress=False)
    with pytest.warns(UserWarning, match="the base's dtype was float32, is bfloat16"):
        evaluate(
            away, recipe(ORDERS[0], model__dtype="bfloat16"), directory=tmp_path / "half", progress=False
        )


# ---- bases that bring a head


def head(folder, tiny_base, labels):
    torch.manual_seed(4)
    names = (
        {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        if labels
        else {}
    )
    config = LlamaConfig.from_pretrained(tiny_base, num_labels=len(labels) or 3, **(names if labels else {}))
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    for file in tiny_base.glob("token*"):
        shutil.copy(file, folder)
    return model


@pytest.mark.parametrize("order", ORDERS)
def test_a_base_with_a_head_is_put_in_the_recipes_order(order, tiny_base, tmp_path):
    stored = head(tmp_path / "base", tiny_base, ORDERS[0])
    model, _ = load_base(ModelSection(path=str(tmp_path / "base")), LabelSpace({"colour": order}))
    ids = torch.tensor([[9, 10, 11]])
    expected = stored(input_ids=ids).logits[:, [ORDERS[0].index(label) for label in order]]
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert [model.config.id2label[index] for index in range(3)] == order


@pytest.mark.parametrize(
    "labels", [["red", "blue", "pink"], ["red", "blue"], ["red", "blue", "green", "pink"]]
)
def test_a_base_with_a_head_for_other_labels_is_refused(labels, tiny_base, tmp_path):
    head(tmp_path / "base", tiny_base, labels)
    space = LabelSpace({"colour": ORDERS[0]})
    with pytest.raises(
        ConfigError,
        match=r"its own head, for the labels 'red', 'blue'.*recipe's are 'red', 'blue', 'green'",
    ):
        load_base(ModelSection(path=str(tmp_path / "base")), space)


def test_a_head_without_names_is_taken_in_the_recipes_order_and_said_so(tiny_base, tmp_path):
    stored = head(tmp_path / "base", tiny_base, [])
    with pytest.warns(UserWarning, match=r"not name its labels \(LABEL_0, …\).*'green', 'red', 'blue', in"):
        model, _ = load_base(ModelSection(path=str(tmp_path / "base")), LabelSpace({"colour": ORDERS[1]}))
    ids = torch.tensor([[9, 10, 11]])
    assert torch.equal(model(input_ids=ids).logits, stored(input_ids=ids).logits)


def test_the_body_alone_gets_a_new_head(tiny_base, tmp_path):
    """The way out that the refusal names."""
    head(tmp_path / "base", tiny_base, ["red", "blue"]).base_model.save_pretrained(tmp_path / "body")
    for file in tiny_base.glob("token*"):
        shutil.copy(file, tmp_path / "body")
    model, _ = load_base(ModelSection(path=str(tmp_path / "body")), LabelSpace({"colour": ORDERS[0]}))
    assert model.config.num_labels == 3


def test_a_label_space_that_is_not_the_models_is_refused(run, recipe, tmp_path):
    directory, _ = run
    loaded = load_for_evaluation(directory.path)
    with pytest.raises(
        ConfigError, match=r"logits are 'red', 'blue', 'green', in this order.*'green', 'red', 'blue'"
    ):
        evaluate_tasks(
            loaded.model, loaded.tokenizer, loaded.tasks, loaded.config, tmp_path,
            label_space=LabelSpace({"colour": ORDERS[1]}), progress=False,
        )  # fmt: skip


def test_peft_alone_reads_the_logits_by_the_card(run, tiny_base):
    directory, _ = run
    card = read_adapter_card(directory.adapter)
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_base, num_labels=len(card.labels), pad_token_id=3
    )
    model = peft.PeftModel.from_pretrained(base, directory.adapter).eval()
    loaded = load_for_evaluation(directory.path)
    rows = [loaded.tokenizer(row["text"]).input_ids for row in loaded.tasks[0].test]
    found = [card.labels[int(model(input_ids=torch.tensor([ids])).logits[0].argmax())] for ids in rows]
    assert found == answers(directory.path)
