"""`compare --engine ray`: the serial table, a lost worker's cell again, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comparison_files import comparison_of, without_timings

from braidlora.cli import main
from braidlora.comparison import RaySettings
from braidlora.comparison._ray import RayCells
from braidlora.config import load_config
from braidlora.errors import ConfigError
from braidlora.runs import hold, working_for

WORDS = ["--methods=lora,alora", "--seeds=0,1", "--no-single-task", "--no-report"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cell-cpus=1"], "--cell-cpus requires --engine ray"),
        (["--address=127.0.0.1:1"], "--address requires --engine ray"),
        (["--engine=ray", "--cell-cpus=0"], "--cell-cpus: got 0; expected a number above 0"),
        (["--engine=ray", "--cell-gpus=-1"], "--cell-gpus: got -1; expected a number of at least 0"),
        (["--engine=ray", "--workers=2"], "--cell-cpus and --cell-gpus decide"),
    ],
)
def test_options_that_do_not_fit(recipe, tmp_path, capsys, words, message):
    assert main(["compare", str(recipe), f"--output={tmp_path / 'out'}", *WORDS, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_ray_the_message_names_the_extra(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'braidlora\[ray\]'"):
        RayCells(RaySettings(), load_config(recipe), tmp_path, "recipe.yaml")


def test_a_worker_elsewhere_writes_under_the_lock_of_who_gave_it_the_work(tmp_path):
    """Another process that holds the folder names itself; this one may write once it works for it."""
    script = (
        "import sys, time; from pathlib import Path; from braidlora.runs import hold, holder_of\n"
        "with hold(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Exception, match=f"process {other.pid}"), hold(tmp_path / "cells" / "one"):
            pass
        holder = json.loads((tmp_path / ".braidlora.lock").read_text())
        with working_for(holder), hold(tmp_path / "cells" / "one"):
            pass
        with pytest.raises(Exception, match=f"process {other.pid}"), hold(tmp_path / "cells" / "one"):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


@pytest.fixture
def ray():
    """Skips without Ray."""
    return pytest.importorskip("ray", reason="Ray is not installed; pip install 'braidlora[ray]'")


def start(recipe: Path, output: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "braidlora",
        "compare",
        recipe,
        f"--output={output}",
        *WORDS,
        "--engine=ray",
    ]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_the_table_is_the_serial_one(ray, recipe, tmp_path):
    for output, engine in (("serial", ["--workers=1"]), ("ray", ["--engine=ray"])):
        assert main(["compare", str(recipe), f"--output={tmp_path / output}", *WORDS, *engine]) == 0
    assert not ray.is_initialized()
    serial, on_ray = (without_timings(comparison_of(tmp_path / one)) for one in ("serial", "ray"))
    assert json.dumps(on_ray["rows"], sort_keys=True) == json.dumps(serial["rows"], sort_keys=True)
    for cell in (tmp_path / "serial" / "cells").iterdir():
        adapter = Path(cell.name) / "adapter" / "adapter_model.safetensors"
        if (tmp_path / "serial" / "cells" / adapter).is_file():
            assert (tmp_path / "ray" / "cells" / adapter).read_bytes() == (
                tmp_path / "serial" / "cells" / adapter
            ).read_bytes()


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_a_cell_whose_worker_is_killed_runs_again(ray, recipe, tmp_path):
    output = tmp_path / "out"
    process = start(recipe, output)
    try:
        killed = _kill_a_worker(process, output)
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
        process.wait()
    assert killed
    assert process.returncode == 0, errors
    assert main(["compare", str(recipe), f"--output={tmp_path / 'serial'}", *WORDS, "--workers=1"]) == 0
    mine, serial = (without_timings(comparison_of(one)) for one in (output, tmp_path / "serial"))
    assert json.dumps(mine["rows"], sort_keys=True) == json.dumps(serial["rows"], sort_keys=True)


def _kill_a_worker(process: subprocess.Popen, output: Path) -> bool:
    """Kill the process that trains a cell, once the cell has begun and before it is done."""
    end = time.monotonic() + 600
    while time.monotonic() < end and process.poll() is None:
        for lock in output.glob("cells/*/.braidlora.lock"):
            try:
                holder = json.loads(lock.read_text())
                os.kill(holder["pid"], signal.SIGKILL)
            except (OSError, ValueError):
                continue
            return True
        time.sleep(0.02)
    return False


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_sigterm_saves_and_the_same_command_resumes(ray, recipe, tmp_path):
    output = tmp_path / "out"
    process = start(recipe, output)
    end = time.monotonic() + 600
    while not list(output.glob("cells/*/.braidlora.lock")) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 143, errors
    assert "the same command resumes" in errors
    assert main(["compare", str(recipe), f"--output={output}", *WORDS, "--engine=ray"]) == 0
    assert len(comparison_of(output)["rows"]) == 2


@pytest.mark.acceptance
def test_no_room_for_a_cell(ray, recipe, tmp_path, capsys):
    words = [*WORDS, "--engine=ray", "--cell-cpus=1000"]
    assert main(["compare", str(recipe), f"--output={tmp_path / 'out'}", *words]) == 2
    assert "no machine of the cluster has 1000 cpus for a cell" in capsys.readouterr().err
