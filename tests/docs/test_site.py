"""The site: every page is in the navigation, every link and anchor leads somewhere, every public name is documented."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import braidlora

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCE = ROOT / "src"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]
CHECKED = ("document_commands", "draw_concepts")  # the other scripts have tests of their own


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site makes them."""
    found: set[str] = set()
    for line in without_code(page.read_text(encoding="utf-8")).split("\n"):
        if re.match(r"#{1,6} ", line):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line.lstrip("# "))
            slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text.lower())).strip("-")
            number = 1
            name = slug
            while name in found:
                name, number = f"{slug}_{number}", number + 1
            found.add(name)
    return found


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.S | re.M)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)", without_code(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_anchor_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.relative_to(ROOT)}: {link}"


def test_every_page_is_in_the_navigation():
    def pages(entries):
        for entry in entries:
            for value in [entry] if isinstance(entry, str) else entry.values():
                yield from [value] if isinstance(value, str) else pages(value)

    # mkdocs.yml has no tags of its own; a safe reader is enough.
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(pages(site["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("script", CHECKED)
def test_generated_pages_and_figures_are_up_to_date(script):
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Rooms whose `__all__` is for the package itself.
INTERNAL = {
    "braidlora.cli": "commands; reference/commands.md has them",
    "braidlora.tasks.read": "rows of a file, for the rooms that read data",
    "braidlora.tasks.rows": "the same",
}


def public_names() -> dict[str, str]:
    """`module.name` of every name in an `__all__` of the package, and the module that has it."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if module in INTERNAL:
                continue
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
                found |= {f"{module}.{name}": module for name in ast.literal_eval(node.value)}
    return found


def resolve(name: str):
    """The object behind a dotted name, and the module if it is one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(f"{name} does not exist")


def test_every_public_name_is_in_the_reference():
    entries = {
        name
        for page in (DOCS / "reference" / "api").glob("*.md")
        for name in re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), flags=re.M)
    }
    documented = [resolve(name) for name in sorted(entries)]
    missing = [
        name
        for name, module in public_names().items()
        if name not in entries
        and module not in entries
        and not any(resolve(name) is one for one in documented)
        if not name.endswith(".__version__")
    ]
    assert not missing, "add these to a page in docs/reference/api, as `::: NAME`: " + ", ".join(missing)
    text = (DOCS / "reference" / "api" / "braidlora.md").read_text(encoding="utf-8")
    assert "`braidlora.__version__`" in text


def test_the_contracts_of_the_package_are_in_the_reference():
    """Names that other programs rely on, wherever they are defined."""
    for name in (
        "braidlora.MultiLoraConfig", "braidlora.FactoredLoraConfig", "braidlora.load", "braidlora.inference.Model",
        "braidlora.federated.ClientUpdate", "braidlora.federated.get_rule",
        "braidlora.federated.protocol.server.Server",
        "braidlora.config.load_config", "braidlora.evaluation.metrics", "braidlora.errors",
        "braidlora.adapters.functional", "braidlora.adapters.sharing",
    ):  # fmt: skip
        pages = (page.read_text(encoding="utf-8") for page in (DOCS / "reference" / "api").glob("*.md"))
        assert any(re.search(rf"^::: {re.escape(name)}$", text, flags=re.M) for text in pages), name


def test_the_exit_code_of_every_error_is_on_its_page():
    from braidlora import errors

    page = (DOCS / "exit-codes.md").read_text(encoding="utf-8")
    codes = {
        one.exit_code for one in vars(errors).values() if isinstance(getattr(one, "exit_code", None), int)
    }
    for code in codes - {1}:
        assert re.search(rf"^## {code}: ", page, flags=re.M), code


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == braidlora.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
