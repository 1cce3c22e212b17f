"""Build the wheel and the source distribution, install each in a new environment, and try them outside of here.

    python scripts/release_check.py             # what `make release-check` calls
    python scripts/release_check.py --keep DIR  # leaves the environment and the distributions there

The wheel is built from the source distribution, so that one lacks nothing. The smoke tests are those of the source
distribution, run next to neither src/ nor the checkout: what they import is what was installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Command line, recipes, and pages of the docs that a new user follows: train, predict, export, federate.
SMOKE = [
    "tests/test_cli.py",
    "tests/test_recipes.py",
    "tests/docs/test_pages_run.py",
    "-k",
    "not exactly and (test_cli or test_recipes or start or ship or howto/federate)",
]
TOOLS = ["pytest>=8.0", "pytest-timeout>=2.3", "hypothesis>=6.100", "pyyaml>=6.0"]
IN_WHEEL = ("braidlora/py.typed", "braidlora/assets/base/model.safetensors", "braidlora/recipes/demo.yaml")
IN_SDIST = (
    "tests/test_cli.py",
    "docs/start.md",
    "mkdocs.yml",
    "notebooks",
    "CITATION.cff",
    "SECURITY.md",
    "Makefile",
)
MOST_BYTES = 10 * 2**20  # of the wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in this folder, which must not exist, and keep it"
    )
    keep = parser.parse_args().keep
    if keep is not None:
        keep.mkdir(parents=True)
        check(keep.resolve())
        return
    with tempfile.TemporaryDirectory(prefix="braidlora-release-") as folder:
        check(Path(folder))


def check(folder: Path) -> None:
    sdist, wheel = build(folder / "dist")
    print(
        f"built {sdist.name} ({sdist.stat().st_size:,} bytes) and {wheel.name} ({wheel.stat().st_size:,} bytes)"
    )
    place = folder / "place"
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    [place] = place.iterdir()
    shutil.rmtree(place / "src")
    environment = folder / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        *constraints,
        f"braidlora[report] @ {wheel.as_uri()}",
        *TOOLS,
    )
    smoke("the wheel", python, place, environment)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(sdist))
    smoke("the source distribution", python, place, environment)


def build(dist: Path) -> tuple[Path, Path]:
    """The source distribution and the wheel made from it, with the files that they must have."""
    run(sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT))
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = [
        name for name in IN_SDIST if not any(have == name or have.startswith(f"{name}/") for have in names)
    ]
    with zipfile.ZipFile(wheel) as archive:
        missing += [name for name in IN_WHEEL if name not in archive.namelist()]
    if missing:
        sys.exit(f"missing in the distributions: {', '.join(missing)}")
    if wheel.stat().st_size > MOST_BYTES:
        sys.exit(f"the wheel has {wheel.stat().st_size:,} bytes; at most {MOST_BYTES:,} are allowed")
    return sdist, wheel


def smoke(what: str, python: Path, place: Path, environment: Path) -> None:
    """The command, the package's location, and the smoke tests."""
    code = "import braidlora; print(braidlora.__version__, braidlora.__file__)"
    found = run(python, "-c", code, cwd=place, output=True)
    if str(environment) not in found:
        sys.exit(f"{what}: imported from elsewhere: {found}")
    run(environment / "bin" / "braidlora", "--version", cwd=place)
    run(environment / "bin" / "braidlora", "preview", "demo", "--rows-per-task=1", cwd=place, output=True)
    run(python, "-m", "pytest", "-q", "--timeout", "1200", *SMOKE, cwd=place)
    print(f"{what}: installed in a new environment, smoke tests passed")


def run(*command: str | Path, cwd: Path | None = None, output: bool = False) -> str:
    """Run a command without the checkout on its path; a failure ends the check."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [str(word) for word in command]
    print(f"$ {' '.join(words)}", flush=True)
    done = subprocess.run(
        words, cwd=cwd, env=clean, text=True, check=False, stdout=subprocess.PIPE if output else None
    )
    if done.returncode:
        sys.exit(f"failed with exit code {done.returncode}: {' '.join(words)}\n{done.stdout or ''}")
    return done.stdout or ""


if __name__ == "__main__":
    main()
