"""The built wheel, outside of the repository: everything that the package reads ships in it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "braidlora"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "hatchling" in done.stderr and done.returncode:
        pytest.skip("hatchling, which builds the wheel, cannot be had here")
    assert done.returncode == 0, done.stderr[-2000:]
    [path] = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_every_file_of_the_package_ships_and_works_from_there(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if name.startswith("braidlora/")}
        archive.extractall(tmp_path)
    here = {
        f"braidlora/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == here
    assert {"braidlora/py.typed", "braidlora/assets/base/model.safetensors"} <= shipped
    assert wheel.stat().st_size < 10 * 2**20
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import braidlora; from braidlora.cli import main; "
        "print(braidlora.__file__); sys.exit(main(['preview', 'demo', '--rows-per-task=1']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert "━━ rising" in done.stdout
