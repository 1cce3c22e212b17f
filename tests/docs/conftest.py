"""The commands of a page, run in a folder of their own as its reader would, in the order of the page."""

import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest

from braidlora.cli import main
from docs.stages import BEFORE, ENCODER, FILES, LONGER, SHORT, WRITER, encoder, shortened, writer
from helpers.pages import commands, steps


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Tiny bases by the hub names that the pages use."""
    folder = tmp_path_factory.mktemp("bases")
    return {ENCODER: str(encoder(folder / "encoder")), WRITER: str(writer(folder / "writer"))}


@pytest.fixture
def reader(tmp_path, monkeypatch, capsys):
    """Does what a page says, and returns the number of commands and examples that ran.

    `reader(page, bases)` puts other bases in place of hub names. `fewer_steps` shortens training; otherwise everything
    is as on the page.
    """
    programs, place = tmp_path / "bin", tmp_path / "place"
    programs.mkdir()
    place.mkdir()
    script = programs / "braidlora"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m braidlora "$@"\n')
    script.chmod(0o755)
    for name, text in FILES.items():
        (place / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")

    def follow(page: Path, bases: Mapping[str, str], *, fewer_steps: bool = True) -> int:
        done, names = 0, {"__name__": "__page__"}
        for command in BEFORE.get(page.name, []):
            _run(command, f"before {page.name}", fewer_steps, capsys)
        for step in steps(page):
            where, text = f"{page.name}:{step.line}", step.text
            for name, path in bases.items():
                text = text.replace(name, path)
            if step.kind == "file":
                text = shortened(text) if fewer_steps else text
                (place / step.name).write_text(text, encoding="utf-8")
            elif step.not_run:
                continue
            elif step.kind == "python":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    exec(compile(text, where, "exec"), names)
                done += 1
            elif step.kind == "commands":
                for command in commands(text):
                    _run(command, where, fewer_steps, capsys)
                    done += 1
        return done

    return follow


def _run(command: str, where: str, fewer_steps: bool, capsys) -> None:
    words = shlex.split(command)
    if words[0] != "braidlora" or "|" in words or ">" in words:
        result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{where}: {command}\n{result.stdout}{result.stderr}"
        return
    verb = words[1]
    if fewer_steps and verb in ("train", "compare", "federate", "analyze", "plan"):
        short = SHORT | LONGER.get(where.partition(":")[0], {})
        words += [word for name in short if name in words[2:4] for word in short[name]]
    if fewer_steps and verb == "compare":
        words += ["--workers=1", "--seeds=0"]  # in this process, which has imported torch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(words[1:])
    out = capsys.readouterr()
    assert code == 0, f"{where}: {command}\n{out.out}{out.err}"
