"""`--engine flower-sim` and the Flower App on Flower's simulation engine."""

import os
import signal
import subprocess
import sys

import yaml
from deployments import NAMES, Service, braidlora, environment, log, recipe, shared

from braidlora.federated.flower.start import app_folder


def test_the_bytes_are_those_of_the_local_engine(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(rounds=2, evaluate_every=1)))
    braidlora("federate", path, f"--output={tmp_path / 'local'}", "--json")
    done = braidlora(
        "federate", path, "--engine", "flower-sim", "--client-cpus", 1, f"--output={tmp_path / 'sim'}"
    )
    assert "Report" in done.stdout
    assert shared(tmp_path / "sim", 2) == shared(tmp_path / "local", 2)
    for name in NAMES:
        ours, theirs = (
            (tmp_path / run / "clients" / name / "adapter" / "adapter_model.safetensors").read_bytes()
            for run in ("sim", "local")
        )
        assert ours == theirs
    logs = [log(tmp_path / run) for run in ("sim", "local")]
    for line in [*logs[0], *logs[1]]:
        del line["timing"]
    assert logs[0] == logs[1]


def test_stopped_and_resumed(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(rounds=4)))
    words = ("federate", path, "--engine", "flower-sim", "--client-cpus", 1, "--federation.keep_rounds=4")
    service = Service((*words, f"--output={tmp_path / 'sim'}"), tmp_path / "sim.log")
    while not (tmp_path / "sim" / "rounds" / "round-1").is_dir():
        assert service.process.poll() is None, service.text()
        signal.sigtimedwait([], 0.1)
    os.kill(service.process.pid, signal.SIGTERM)
    assert service.process.wait(120) == 143, service.text()
    assert "--resume auto continues" in service.text()
    braidlora(*words, "--resume", "auto", f"--output={tmp_path / 'sim'}")
    braidlora("federate", path, "--federation.keep_rounds=4", f"--output={tmp_path / 'local'}", "--json")
    assert shared(tmp_path / "sim", 4) == shared(tmp_path / "local", 4)


def test_stock_flwr_run_takes_the_app(tmp_path, free_port):
    """With a SuperLink of Flower's own, started and stopped here; nothing is installed and nothing stays behind."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(rounds=1)))
    port = free_port()
    home = tmp_path / "flower"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    env = environment(
        FLWR_HOME=str(home), FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1", FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0",
        PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
    )  # fmt: skip
    with open(tmp_path / "superlink.log", "wb") as file:
        link = subprocess.Popen(
            ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)],
            env=env, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        for _ in range(300):
            if b"Uvicorn running" in (tmp_path / "superlink.log").read_bytes():
                break
            signal.sigtimedwait([], 0.2)
        command = [
            "flwr", "run", str(app_folder()), "here", "--stream", "--federation-config",
            "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2", "--run-config",
            f'recipe="{path}" output="{tmp_path / "run"}"',
        ]  # fmt: skip
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr + done.stdout
    finally:
        link.terminate()
        link.wait(30)
    braidlora("federate", path, f"--output={tmp_path / 'local'}", "--json")
    assert shared(tmp_path / "run", 1) == shared(tmp_path / "local", 1), done.stdout[-3000:]
