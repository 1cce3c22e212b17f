"""The Python calls: `braidlora.train`, `compare`, `federate`, `analyze`, `load`; and clients and cells as targets."""

import re
import subprocess
import sys
import warnings

import pytest

import braidlora
from braidlora.errors import ConfigError

RECIPE = """
tasks:
- name: sum
  train: {source: "generated:sum", limit: 12}
  test: {source: "generated:sum", limit: 3}
- name: mood
  train: {source: "generated:mood", limit: 12}
  test: {source: "generated:mood", limit: 3}
adapter: {r: 2, target_modules: [q_proj]}
prompt: {template: "{instruction} =", cutoff: 48}
evaluation: {max_new_tokens: 4}
"""
SMALL = {"training__max_steps": 2, "training__warmup_steps": 0, "training__threads": 1}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_the_import_stays_light():
    program = "import braidlora, sys; assert 'torch' not in sys.modules; assert 'load' in dir(braidlora)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_recipe_is_trained_analyzed_and_used(recipe, tmp_path):
    result = braidlora.train(
        recipe, progress=False, output=tmp_path / "run", **{"tasks.*.test.limit": 2}, **SMALL
    )
    assert result.steps == 2
    assert [task["n"] for task in result.metrics["tasks"].values()] == [2, 2]
    assert braidlora.analyze([result.directory, result.directory / "adapter_init"])
    model = braidlora.load(result.directory / "checkpoints" / "step-2")
    text = model.predict("sum 1 2", "sum")[0]["prediction"]
    assert text == braidlora.load(result.directory).predict("sum 1 2", "sum")[0]["prediction"]
    with pytest.raises(ConfigError, match=r"unknown key; did you mean --training\.learning_rate"):
        braidlora.train(recipe, training__learning_rat=1)


def test_a_comparisons_run_is_a_target(recipe, tmp_path):
    result = braidlora.compare(
        recipe, methods=["lora"], seeds=[0], references="none", workers=1, report=False, progress=False,
        output=str(tmp_path / "cmp"), **SMALL,
    )  # fmt: skip
    assert not result["failed"]
    with pytest.raises(ConfigError, match="a comparison; give one of its runs") as caught:
        braidlora.load(tmp_path / "cmp")
    name = re.search(r"NAME is one of (\S+)\.", str(caught.value))[1]
    assert braidlora.load(tmp_path / "cmp" / "cells" / name).predict("sum 1 2", "sum")


def test_a_federations_client_is_a_target(recipe, tmp_path):
    with open(recipe, "a") as file:
        file.write("federation: {rule: fed-alora, rounds: 1, local: {steps: 1}}\n")
    result = braidlora.federate(recipe, progress=False, output=str(tmp_path / "fed"))
    with pytest.raises(ConfigError, match="a federation; each client has its own model"):
        braidlora.load(result.directory)
    model = braidlora.load(result.directory / "clients" / "sum")
    assert model.tasks == ["sum"]
    (answer,) = model.predict("sum 1 2")
    folder = result.directory / "clients" / "sum" / "adapter"
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    code = code.replace('"PATH_OF_THIS_FOLDER"', repr(str(folder))).replace("YOUR INSTRUCTION", "sum 1 2")
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, found)
    assert found["answer"] == answer["prediction"]


def test_the_code_of_a_chat_adapter_has_the_recipes_template(recipe, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    words = {"prompt": {"template": "chat", "cutoff": 64}, "model.chat_template": str(template)}
    run = braidlora.train(recipe, progress=False, output=tmp_path / "run", **words, **SMALL).directory
    (code,) = re.findall(r"```python\n(.*?)```", (run / "adapter" / "README.md").read_text(), flags=re.S)
    code = code.replace("PATH_OF_THIS_FOLDER", str(run / "adapter")).replace("YOUR INSTRUCTION", "sum 1 2")
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, found)
    assert "<assistant>" in found["prompt"]
    assert found["answer"] == braidlora.load(run).predict("sum 1 2", "sum")[0]["prediction"]
