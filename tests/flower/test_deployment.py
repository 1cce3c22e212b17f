"""The steps of docs/howto/deploy.md on one machine: TLS, node keys, sites that see their own folder alone."""

import json
import os
import signal
import stat
import subprocess

import pytest
import yaml
from deployments import NAMES, Deployment, braidlora, foreign_python, log, processes_below, shared


@pytest.fixture(scope="module")
def deployment(open_folder, free_port):
    """Sites run as users of their own where this test is root, and otherwise as its user."""
    python = foreign_python(open_folder / "python")
    folder = open_folder / "deployment"
    folder.mkdir(mode=0o755)
    options = {"python": python, "users": True} if python is not None else {}
    # Patient, for machines that are busy with other things.
    settings = {"absence": 600, "wait": 900}
    made = Deployment(folder, free_port(), settings=settings, rounds=2, evaluate_every=1, **options)
    try:
        made.serve()
        made.join()
        yield made
    finally:
        made.close()
    assert not processes_below(folder), "something stayed behind"


@pytest.fixture(scope="module")
def finished(deployment):
    """A finished federation, and what the command printed."""
    return deployment.folder / "run", deployment.federate(deployment.folder / "run")


def test_before_the_first_run_status_says_who_is_connected(deployment):
    if (deployment.folder / "server" / "jobs").exists():
        pytest.skip("there was a run")
    status = deployment.status()
    assert status["run"] == {
        "active": False, "state": "none", "text": "no run has been started", "error": None,
    }  # fmt: skip
    assert {name: one["connected"] for name, one in status["sites"].items()} == dict.fromkeys(NAMES, True)


def test_a_federation_gives_the_bytes_of_the_local_engine(deployment, finished):
    run, done = finished
    local = deployment.folder / "local"
    braidlora("federate", deployment.recipe, f"--output={local}", "--json")
    assert shared(run, 2) == shared(local, 2)
    logs = [log(one) for one in (run, local)]
    for line in [*logs[0], *logs[1]]:
        del line["timing"]
    assert logs[0] == logs[1]
    for name in NAMES:
        ours = deployment.state(name).parent / "adapter" / "adapter_model.safetensors"
        assert ours.read_bytes() == (local / "clients" / name / "adapter" / ours.name).read_bytes()
    assert (run / "report.html").is_file(), done.stdout
    assert "round 2: 3 sites" in done.stderr


def test_status_names_sites_rounds_bytes_and_losses(deployment, finished):
    status = deployment.status()
    assert status["superlink"]
    assert status["rounds"] == status["counted"] == 2
    assert status["phase"] == "no run active; the last run finished: 2 rounds"
    for name in NAMES:
        one = status["sites"][name]
        assert one["connected"]
        assert one["rounds"] == 2
        assert one["loss"] > 0
        assert one["up"] > one["down"] > 0
    assert "mood" in braidlora("site", "status", deployment.folder / "server").stdout


def test_each_site_sees_its_own_folder_alone(deployment, finished):
    if not deployment.users:
        pytest.skip("needs root, setpriv, and a Python that other users can run")
    users = {name: (deployment.folder / name).stat().st_uid for name in NAMES}
    assert len(set(users.values())) == 3
    for name, user in users.items():
        for path in (deployment.folder / name).rglob("*"):
            assert path.stat().st_uid == user, path
        command = ["setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups", "ls"]
        for other in (*NAMES, "server"):
            done = subprocess.run(
                [*command, str(deployment.folder / other)], capture_output=True, check=False
            )
            assert (done.returncode == 0) is (other == name), (name, other)


def test_private_keys_are_the_owners_and_nowhere_else(deployment, finished):
    keys = {}
    for path in deployment.folder.rglob("*"):
        if path.is_file() and path.name.endswith(".key"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            keys[path] = b"".join(path.read_bytes().splitlines()[1:-1]) or path.read_bytes()
    assert len(keys) == 2 + 3 + 3  # the authority's, the server's, each node's and each site's digest key
    for path in deployment.folder.rglob("*"):
        if path.is_file() and path not in keys and "lib/python" not in str(path):
            content = path.read_bytes()
            assert b"PRIVATE KEY" not in content, path
            assert not any(key[:60] in content.replace(b"\n", b"") for key in keys.values()), path


def test_what_a_client_keeps_never_reaches_the_server(deployment, finished):
    run, _ = finished
    for name in NAMES:
        state = next(deployment.state(name).glob("*/state.safetensors")).read_bytes()
        assert b"lora_A" in state
    for path in [*run.rglob("*"), *(deployment.folder / "server").rglob("*")]:
        if path.is_file() and path.suffix in (".safetensors", ".json", ".jsonl", ".db"):
            assert b"lora_A.weight" not in path.read_bytes(), path


def test_a_key_that_is_not_registered_is_refused(deployment, finished, open_folder):
    folder = deployment.folder / "stranger"
    deployment.init_site("mood", 5, folder)
    env = {"HOME": str(folder)}
    users = deployment.users
    if users:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, 0, 0)
    done = braidlora("site", "join", folder, check=False, env=env, timeout=240)
    assert done.returncode == 6
    assert "The server does not know this site's key" in done.stderr
    assert "traceback" not in done.stderr.lower()


def test_a_node_that_claims_anothers_name_is_refused(deployment, finished):
    """The site `sum` says that it is `mood`, with its own key."""
    deployment.sites["sum"].stop()
    connected = {name: one["connected"] for name, one in deployment.status()["sites"].items()}
    assert connected == {"mood": True, "rising": True, "sum": False}, "although no run is active"
    path = deployment.folder / "sum" / "site.yaml"
    before = path.read_text()
    path.write_text(before.replace("name: sum", "name: mood"))
    try:
        deployment.join("sum", wait=False)
        deployment.sites["sum"].wait_for("mood: connected")
        done = deployment.federate(deployment.folder / "claimed", check=False)
        assert done.returncode == 6
        assert "sum: client: the site replies as 'mood'; its key belongs to 'sum'" in done.stderr
        assert "Check `name` in site.yaml at sum" in done.stderr
        assert "waiting for" not in done.stderr or "waiting for 1 site: sum" in done.stderr
        assert not (deployment.folder / "claimed" / "rounds").exists()
    finally:
        deployment.sites["sum"].stop()
        path.write_text(before)
        deployment.join("sum")


def test_resume_adds_rounds(deployment, finished):
    run, _ = finished
    done = deployment.federate(run, "--resume", "auto", "--federation.rounds=3", "--json")
    assert json.loads(done.stdout)["rounds"] == 3
    assert [line["counted"] for line in log(run)] == [True, True, True]


def test_ctrl_c_ends_the_server_app_and_status_says_so(deployment):
    run = deployment.folder / "stopped"
    service = deployment.start(run, "--federation.rounds=60")
    deployment.wait_until(lambda status: (run / "rounds" / "round-1").is_dir())
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(120) == 130, service.text()
    status = deployment.status()
    assert not status["run"]["active"]
    assert status["run"]["state"] == "stopped"
    rounds = status["rounds"]
    assert status["phase"] == (
        f"no run active; the last run was stopped after round {rounds}; --resume auto continues it"
    )
    assert not any(one["waiting_since"] for one in status["sites"].values())
    deployment.federate(run, "--resume", "auto", f"--federation.rounds={rounds + 1}")
    assert deployment.status()["phase"] == f"no run active; the last run finished: {rounds + 1} rounds"


def test_a_recipe_that_no_site_can_load_is_rejected_at_once(deployment):
    """With the message of the sites, instead of a wait for sites that cannot join."""
    path = deployment.folder / "classify.yaml"
    recipe = yaml.safe_load(deployment.recipe.read_text())
    path.write_text(
        yaml.safe_dump({**recipe, "tasks": [{**task, "kind": "classify"} for task in recipe["tasks"]]})
    )
    words = ["--engine", "flower", "--site", deployment.folder / "server", f"--output={path.with_suffix('')}"]
    done = braidlora("federate", path, *words, check=False, timeout=120)
    assert done.returncode == 2
    assert "tasks.mood.options: missing" in done.stderr
    assert "A site reads only its own rows" in done.stderr
