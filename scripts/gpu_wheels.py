"""Collect the wheels that braidlora needs on a GPU machine without access to a package index.

    python scripts/gpu_wheels.py                            # for Python 3.12 on Linux x86-64, into gpu-wheels/
    python scripts/gpu_wheels.py --python 3.11 --has torch,triton,numpy,scipy
    on the machine:
           python -m pip install --no-index --no-deps --target site gpu-wheels/part*/*.whl
           PYTHONPATH=site:src python benchmarks/gpu.py

torch, triton and CUDA's own libraries are excluded: they come with the machine. Requirements of the wheels are resolved
recursively. The folder is split into parts of at most --part MiB, so that each can be copied separately.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
ALWAYS_THERE = {"torch", "triton", "setuptools"}
ALSO = ("bitsandbytes", "pytest", "pytest-timeout", "hypothesis")
PLATFORMS = [f"manylinux_2_{glibc}_x86_64" for glibc in (17, 24, 27, 28, 31, 34, 35)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def dependencies() -> list[Requirement]:
    """Requirements from pyproject.toml, plus those of the benchmark and its tests."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    if block is None:
        raise SystemExit("pyproject.toml: no dependencies found")
    return [Requirement(one) for one in [*re.findall(r'^\s*"([^"]+)"', block[1], re.M), *ALSO]]


def fetch(requirement: Requirement, version: str, folder: Path) -> Path:
    """The wheel for one requirement, built here if only a pure-Python source distribution is published."""
    before = set(folder.glob("*.whl"))
    common = ["--quiet", "--no-deps", "-c", str(ROOT / "constraints.txt")]
    name = f"{requirement.name}{requirement.specifier}"
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *common,
        "--only-binary=:all:",
        "--python-version",
        version,
    ]
    for platform in PLATFORMS:
        download += ["--platform", platform]
    done = subprocess.run(
        [*download, "--implementation", "cp", "-d", str(folder), name],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        build = [sys.executable, "-m", "pip", "wheel", *common, "-w", str(folder), name]
        if subprocess.run(build, capture_output=True, text=True, check=False).returncode:
            raise SystemExit(f"{name}: no wheel for Python {version}.\n{done.stderr[-2000:]}")
    [wheel] = set(folder.glob("*.whl")) - before
    if "py3-none-any" not in wheel.name and done.returncode:
        raise SystemExit(f"{wheel.name} was built for this machine and would not run on another one.")
    return wheel


def requirements(wheel: Path, version: str) -> list[Requirement]:
    """Requirements of a wheel on the target machine, without extras."""
    environment = {
        "python_version": version, "python_full_version": f"{version}.0", "sys_platform": "linux", "extra": "",
        "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode("utf-8").split("\n")
    found = [
        Requirement(line.partition(":")[2].strip()) for line in lines if line.startswith("Requires-Dist:")
    ]
    return [one for one in found if one.marker is None or one.marker.evaluate(environment)]


def split(folder: Path, limit: int) -> None:
    """Move the wheels into part1, part2, … of at most `limit` MiB; a larger wheel gets its own part."""
    parts: list[list[Path]] = []
    sizes: list[int] = []
    for wheel in sorted(folder.glob("*.whl"), key=lambda path: -path.stat().st_size):
        size = wheel.stat().st_size
        place = next((i for i, total in enumerate(sizes) if total + size <= limit * 2**20), len(parts))
        if place == len(parts):
            parts.append([])
            sizes.append(0)
        parts[place].append(wheel)
        sizes[place] += size
    for number, (wheels, size) in enumerate(zip(parts, sizes, strict=True), 1):
        part = folder / f"part{number}"
        part.mkdir()
        for wheel in wheels:
            shutil.move(wheel, part)
        print(f"{part}: {len(wheels)} wheels, {size / 2**20:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="3.12", help="the machine's version (default 3.12)")
    parser.add_argument("--has", default="", help="packages already on the machine, separated by commas")
    parser.add_argument("--part", type=int, default=60, help="maximum size of a part in MiB (default 60)")
    parser.add_argument("--out", type=Path, default=Path("gpu-wheels"))
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; remove it or choose another folder")
    arguments.out.mkdir(parents=True)
    done = ALWAYS_THERE | {canonicalize_name(name) for name in arguments.has.split(",") if name}
    queue = dependencies()
    while queue:
        requirement = queue.pop(0)
        name = canonicalize_name(requirement.name)
        if name in done or name.startswith("nvidia-"):
            continue
        done.add(name)
        queue += requirements(fetch(requirement, arguments.python, arguments.out), arguments.python)
    split(arguments.out, arguments.part)


if __name__ == "__main__":
    main()
