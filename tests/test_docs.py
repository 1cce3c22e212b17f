"""The pages say what the code does: the table of recipe keys, the commands, the Python examples."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from braidlora.assets import embedded_base_path
from braidlora.cli import EPILOG, build_parser, parse_words
from braidlora.config import FederatedConfig, built_in_recipes, load_config, schema_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def verbs(parser: argparse.ArgumentParser, before: str = "") -> set[str]:
    """The verbs of the command line, those of two words among them."""
    found = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found |= {before + name, *verbs(inner, f"{before}{name} ")}
    return found


VERBS = verbs(build_parser())


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_has_the_markers_of_a_merge(page):
    assert not re.findall(r"^(?:<{7} .*|={7}|>{7} .*)$", page.read_text(encoding="utf-8"), flags=re.M)


def test_the_table_of_recipe_keys_is_that_of_the_schema():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "document_recipe.py"), "--check"], check=True)


def test_the_tables_of_results_are_those_of_the_benchmarks():
    subprocess.run([sys.executable, str(ROOT / "scripts" / "document_results.py"), "--check"], check=True)


def test_results_name_the_recipe_that_made_them(monkeypatch):
    """The recipe that a table names exists, takes its overrides, and has the base of its numbers."""
    monkeypatch.chdir(ROOT)
    found = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    federations = [result for result in found if result.get("kind") == "federations"]
    cases = [case for result in found if result.get("kind") == "memory" for case in result["cases"]]
    studies = [result for result in found if "study" in result]
    assert min(map(len, (federations, cases, studies))) > 1
    for result in federations:
        load_config(result["recipe"], result["options"], FederatedConfig)
    for case in cases:
        load_config(case["recipe"], case["overrides"])
    for result in studies:
        words = shlex.split(result["command"])
        config = load_config(words[3], [word for word in words if word.startswith(("--training", "--model"))])
        base = config.model.path.split("/")[-1].replace("-", "_").lower()
        assert base in result["study"]["base"].lower()
        assert set(result["study"]["tasks"]) <= {task.name for task in config.tasks}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_parses(page):
    """Verb, options and recipe names exist; overrides are keys of the recipe."""
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"(?:^ {4}|`)(braidlora [a-z].*?)(?:`| +#|$)", text, flags=re.M)
    for command in commands:
        words = shlex.split(command)[1:]
        if any(word.isupper() or "…" in word or "[" in word for word in words):
            continue  # a form such as `braidlora train RECIPE`
        if " ".join(words) in VERBS:
            continue  # a verb that the text names, without its arguments
        args, unknown = parse_words(words)
        recipe = getattr(args, "recipe", None)
        if recipe in built_in_recipes():
            load_config(recipe, unknown, schema_of(recipe))
        for word in unknown:
            assert word.startswith("--"), f"{page.name}: {command}"
            section = word[2:].split("=")[0].split(".")[0]
            assert section in FederatedConfig.model_fields, f"{page.name}: {command}"


def test_overrides_that_a_shell_would_expand_are_quoted():
    """zsh takes an unquoted * or [ for a pattern, and stops if no file matches."""
    files = [
        *PAGES,
        *(ROOT / "src" / "braidlora" / "recipes").rglob("*.yaml"),
        *(ROOT / "benchmarks").glob("*.yaml"),
    ]
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    texts["--help"] = EPILOG
    unquoted = re.compile(r"(?<=[\s`(])--[^\s`'\"]*[*\[][^\s`]*")
    assert unquoted.search(" braidlora train demo --tasks.*.train.limit=5")
    assert unquoted.search(" --adapter.target_modules=[q_proj]")
    assert {name: found for name, text in texts.items() if (found := unquoted.findall(text))} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_on_a_page_is_valid(page, tmp_path):
    for block in blocks(page, "yaml"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(block, encoding="utf-8")
        assert load_config(recipe, [], schema_of(recipe)).tasks


def test_the_make_targets_on_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    command = r"(?:^ {4}|`)make ([a-z-]+)"
    named = {
        name for page in PAGES for name in re.findall(command, page.read_text(encoding="utf-8"), flags=re.M)
    }
    assert named <= targets


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_peft_example_of_the_readme_runs(tmp_path):
    """As it stands, but for the base model; and what it saves loads as the text says."""
    (example,) = blocks(ROOT / "README.md", "python")
    adapter = tmp_path / "adapter"
    namespace: dict = {}
    exec(example.replace('"Qwen/Qwen2-7B"', repr(str(embedded_base_path()))), namespace)
    namespace["model"].save_pretrained(str(adapter))
    namespace["base"] = namespace["model"].unload()
    loading = 'peft.PeftModel.from_pretrained(base, "path/to/adapter")'
    assert f"`{loading}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    model = eval(loading.replace('"path/to/adapter"', repr(str(adapter))), namespace)
    assert model.peft_config["default"].num_experts == 3
