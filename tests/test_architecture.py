"""The import rules of docs/concepts/architecture.md, held to the code: its table lists exactly the imports."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "braidlora"
PAGE = (ROOT / "docs" / "concepts" / "architecture.md").read_text(encoding="utf-8")
FILES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
# Modules at the top level of the package that every other module may use; they import only each other.
COMMON = {"braidlora", "braidlora.__main__"} | {
    f"braidlora.{name}"
    for name in re.findall(r"`(\w+)`", PAGE.partition("common modules are")[2].partition("\n\n")[0])
}


def table() -> dict[str, set[str]]:
    """The packages in the table of the page, and what each may import."""
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| ([^|]*) \|$", PAGE, flags=re.MULTILINE)
    return {name: set(re.findall(r"`([\w.]+)`", imports)) for name, imports in rows}


PACKAGES = table()


def package_of(module: str) -> str:
    """The most specific row of the table for a module (`adapters.sharing`, otherwise `adapters`), or `common`."""
    if re.fullmatch(r"braidlora\.federated\.protocol\.rules\.(\w+_)?rule", module):
        return "federated.protocol"  # the classes that aggregate lie next to the torch-free specs
    name = module
    while name not in COMMON and name.removeprefix("braidlora.") not in PACKAGES:
        name = name.rpartition(".")[0]
        assert name, f"{module} is not in the table"
    return "common" if name in COMMON else name.removeprefix("braidlora.")


def imported(module: str) -> Iterator[str]:
    """Our modules that a module imports when it runs, at any level; what only type checkers import does not count."""
    nodes: list[ast.AST] = [ast.parse(FILES[module].read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "braidlora")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: a relative import"
            if node.module and node.module.partition(".")[0] == "braidlora":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield full if full in FILES else node.module


def edges() -> dict[tuple[str, str], list[str]]:
    """The imports between packages, and the modules that have them."""
    found: dict[tuple[str, str], list[str]] = {}
    for module in FILES:
        for other in imported(module):
            pair = package_of(module), package_of(other)
            if pair[0] != pair[1] and module not in ("braidlora", "braidlora.__main__"):
                found.setdefault(pair, []).append(f"{module} → {other}")
    return found


def test_packages_import_what_the_page_allows_and_nothing_else():
    problems = [
        f"{package} may not import {other}: {', '.join(sorted(set(where)))}"
        for (package, other), where in sorted(edges().items())
        if other != "common" and other not in PACKAGES.get(package, set())
    ]
    assert not problems, "\n".join(problems)


def test_the_page_lists_no_import_that_is_gone():
    used = {pair for pair in edges() if pair[1] != "common"}
    listed = {(package, other) for package, others in PACKAGES.items() for other in others}
    assert not listed - used


def test_every_package_is_on_the_page():
    names = {path.parent.name for path in SOURCE.glob("*/__init__.py")} | {
        path.stem for path in SOURCE.glob("*.py")
    }
    listed = {name.partition(".")[0] for name in PACKAGES} | {name.rpartition(".")[2] for name in COMMON}
    assert names - {"__init__", "__main__"} == listed - {"braidlora", "__main__"}


def test_no_package_imports_itself_through_others():
    tuple(TopologicalSorter(PACKAGES).static_order())  # raises CycleError, which names the cycle


def test_the_protocol_has_no_paths_processes_or_output():
    """What two parties say to each other does not depend on where they run."""
    problems = []
    for module, path in FILES.items():
        if not module.startswith("braidlora.federated.protocol"):
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                names = ["print"]
            problems += [
                f"{module}:{node.lineno}: {name}"
                for name in names
                if name.partition(".")[0]
                in ("pathlib", "os", "shutil", "subprocess", "multiprocessing", "socket", "print")
            ]
    assert not problems, "\n".join(problems)


TABLES = {"adapters.sharing", "federated.protocol.rules", "federated.protocol.factors"}
LIGHT_PACKAGES = {"common", "config", "runs", "reporting", *TABLES}


def test_configuration_directories_tables_and_reports_need_no_torch():
    """`--help` and messages about a recipe take a moment, and reports are drawn without torch."""
    light = [
        module for module in FILES if package_of(module) in LIGHT_PACKAGES and not module.endswith("__main__")
    ]
    assert len(light) > 40
    program = f"""
import importlib, sys
for name in {light}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
