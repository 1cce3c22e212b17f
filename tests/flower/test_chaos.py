"""What a deployment does when parts of it are killed, cut off, slow, full or lying: a table in docs/howto/deploy.md."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from deployments import NAMES, SOURCE, Deployment, braidlora, log, processes_below, shared

ROUNDS = 2
PATIENCE = {"deadline": 600, "absence": 300, "wait": 300}
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0, reason="needs root on Linux: mounts, network namespaces"
)


@pytest.fixture(scope="module")
def chaos(open_folder, free_port):
    """Rounds of some seconds, and little patience."""
    folder = open_folder / "chaos"
    folder.mkdir(mode=0o755)
    made = Deployment(folder, free_port(), settings=PATIENCE, rounds=ROUNDS, local={"epochs": 6})
    try:
        made.serve()
        made.join()
        yield made
    finally:
        made.close()
    assert not processes_below(folder), "something stayed behind"


@pytest.fixture(scope="module")
def expected(chaos):
    """The shared state after the last round, when nothing goes wrong."""
    braidlora("federate", chaos.recipe, f"--output={chaos.folder / 'calm'}", "--json")
    return shared(chaos.folder / "calm", ROUNDS)


@contextlib.contextmanager
def patience(chaos, **seconds):
    """Other waiting times for the federations in this block."""
    path = chaos.folder / "server" / "server.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump({**yaml.safe_load(before), **seconds}))
    try:
        yield
    finally:
        path.write_text(before)


def in_round_2(chaos, run, name="sum"):
    """Wait until a site trains in round 2."""
    chaos.wait_until(
        lambda status: (run / "rounds" / "round-1").is_dir() and status["sites"][name]["waiting_since"]
    )
    time.sleep(4)  # the SuperNode looks for messages every three seconds


def worker_of(service):
    """The process id of a site's worker."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes()
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if b"braidlora.federated.flower.worker" in words and parent == service.process.pid:
            return int(path.name)
    raise AssertionError("there is no worker")


def ends(service, code):
    assert service.process.wait(600) == code, service.text()


def test_kill_of_a_site_while_it_trains(chaos, expected):
    """It is started again: it gets the message again, and the round has its update."""
    run = chaos.folder / "killed-site"
    service = chaos.start(run)
    in_round_2(chaos, run)
    chaos.kill("sum")
    chaos.join("sum")
    ends(service, 0)
    assert [sorted(line["clients"]) for line in log(run)] == [list(NAMES)] * ROUNDS
    assert shared(run, ROUNDS) == expected


def test_kill_of_a_worker_while_it_trains(chaos, expected):
    """The site starts it again, and asks it once more."""
    run = chaos.folder / "killed-worker"
    service = chaos.start(run)
    in_round_2(chaos, run)
    os.kill(worker_of(chaos.sites["sum"]), signal.SIGKILL)
    ends(service, 0)
    assert shared(run, ROUNDS) == expected


def test_kill_of_the_superlink(chaos, expected):
    """Committed rounds stay; sites connect again by themselves; a resume gives the same bytes."""
    run = chaos.folder / "killed-superlink"
    service = chaos.start(run)
    in_round_2(chaos, run)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes() if path.exists() else b""
        if b"braidlora.federated.flower.superlink" in words and str(chaos.port).encode() in words:
            os.kill(int(path.parent.name), signal.SIGKILL)
    assert chaos.server.process.wait(60) == 6
    assert "the SuperLink ended with code -9" in chaos.server.text()
    ends(service, 6)
    assert "resume auto" in service.text()
    assert [line["round"] for line in log(run)] == [1]
    chaos.serve()
    chaos.federate(run, "--resume", "auto")
    assert shared(run, ROUNDS) == expected


def test_kill_of_the_server_app(chaos, expected):
    run = chaos.folder / "killed-app"
    service = chaos.start(run)
    in_round_2(chaos, run)
    os.kill(json.loads((chaos.folder / "server" / "status.json").read_text())["pid"], signal.SIGKILL)
    ends(service, 6)
    assert "the server app ended without a result" in service.text()
    assert [line["round"] for line in log(run)] == [1]
    chaos.federate(run, "--resume", "auto")
    assert shared(run, ROUNDS) == expected


def test_kill_of_the_server_app_while_it_commits(chaos, expected):
    run = chaos.folder / "killed-commit"
    service = chaos.start(run)
    chaos.wait_until(lambda status: status["output"] == str(run))
    pid = json.loads((chaos.folder / "server" / "status.json").read_text())["pid"]
    while not list((run / "rounds").glob(".round-2*/shared.safetensors")):
        assert service.process.poll() is None, service.text()
    os.kill(pid, signal.SIGKILL)
    ends(service, 6)
    chaos.federate(run, "--resume", "auto")
    assert shared(run, ROUNDS) == expected


def test_a_site_that_lies(chaos):
    """NaN, wrong ranks, ×1000, A, base weights and an old update: each is rejected by name, and all rounds count."""
    chaos.sites["sum"].stop()
    chaos.join("sum", env={"PYTHONPATH": f"{Path(__file__).parent / 'spoil'}{os.pathsep}{SOURCE}"})
    run = chaos.folder / "lies"
    done = chaos.federate(run, "--federation.rounds=7")
    lines = log(run)
    assert all(line["counted"] for line in lines)
    assert "loss" in lines[0]["clients"]["sum"]
    found = [(line["failed"]["sum"]["codes"], line["failed"]["sum"]["why"][0]) for line in lines[1:]]
    assert [codes for codes, _ in found] == [["rejected"]] * 2 + [["outlier"]] + [["rejected"]] * 3
    for (_, why), words in zip(
        found, ("NaN", "rank 2 for 8", "median", "lora_A", "lm_head", "round 1; round 7 is open"), strict=True
    ):
        assert words in why
    assert "sum" in done.stderr
    chaos.sites["sum"].stop()
    chaos.join("sum")


@needs_root
def test_a_full_disk_at_the_server(chaos, expected):
    folder = chaos.folder / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", folder], check=True)
    try:
        done = chaos.federate(folder / "run", check=False)
        assert done.returncode == 4, done.stderr
        assert "cannot be written" in done.stderr
        assert "--resume auto" in done.stderr
        subprocess.run(["mount", "-o", "remount,size=20m", folder], check=True)
        chaos.federate(folder / "run", "--resume", "auto")
        assert shared(folder / "run", ROUNDS) == expected
    finally:
        subprocess.run(["umount", folder], check=True)


@needs_root
def test_a_full_disk_at_a_site(chaos):
    """The code `disk`; the others go on, and the site is back once there is room."""
    folder = chaos.folder / "sum" / "federations"
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder], check=True)
    try:
        run = chaos.folder / "full-site"
        service = chaos.start(run)
        chaos.wait_until(lambda status: (run / "rounds" / "round-1").is_dir())
        subprocess.run(["mount", "-o", "remount,size=20m", folder], check=True)
        ends(service, 0)
        lines = log(run)
        assert set(lines[0]["failed"]["sum"]["codes"]) == {"disk"}
        assert all(line["counted"] for line in lines)
        assert "loss" in lines[-1]["clients"]["sum"]
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()
        aside.rename(folder)


# Imported by Python at its start; the SuperNode signs what it sends along with the time. libfaketime cannot do this:
# it breaks the call by which Python 3.11 sleeps.
AN_HOUR_LATE = """
import datetime, sys

class Late(datetime.datetime):
    __slots__ = ()  # its size is checked by extensions

    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(hours=1)

if any("flower_supernode" in word for word in sys.orig_argv):
    datetime.datetime = Late
"""


def test_a_clock_that_is_an_hour_wrong(chaos):
    """The server refuses what the site signs, and the message says where to look."""
    chaos.sites["sum"].stop()
    (chaos.folder / "clock").mkdir()
    (chaos.folder / "clock" / "sitecustomize.py").write_text(AN_HOUR_LATE)
    env = {"PYTHONPATH": os.pathsep.join([str(chaos.folder / "clock"), str(SOURCE)])}
    done = braidlora("site", "join", chaos.folder / "sum", check=False, env=env)
    assert done.returncode == 6
    said = (chaos.folder / "sum" / "supernode.log").read_text()
    assert "the clock here is wrong" in done.stderr, said[-3000:]
    chaos.join("sum")


@needs_root
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs `ip` (iproute2)")
def test_a_network_cut_during_an_upload(open_folder, free_port):
    """A site in a network namespace; its link is down for 30 s while it sends. And what it can reach of the server."""
    name, here, there = f"bl{os.getpid() % 10_000}", "10.253.77.1", "10.253.77.2"
    link, inside = f"{name}a", f"{name}b"
    commands = [
        ["ip", "netns", "add", name],
        ["ip", "link", "add", link, "type", "veth", "peer", "name", inside],
        ["ip", "link", "set", inside, "netns", name],
        ["ip", "addr", "add", f"{here}/30", "dev", link],
        ["ip", "link", "set", link, "up"],
        ["ip", "-n", name, "addr", "add", f"{there}/30", "dev", inside],
        ["ip", "-n", name, "link", "set", inside, "up"],
        ["ip", "-n", name, "link", "set", "lo", "up"],
    ]
    made = [subprocess.run(command, capture_output=True, text=True, check=False) for command in commands]
    if any(one.returncode for one in made):
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)
        pytest.skip(f"no network namespaces here: {next(one.stderr for one in made if one.returncode)}")
    folder = open_folder / "cut"
    folder.mkdir()
    cut = Deployment(folder, free_port(), host=here, settings=PATIENCE, rounds=2, local={"epochs": 4})
    enter = ["ip", "netns", "exec", name]
    try:
        cut.serve()
        cut.join("mood", "rising")
        cut.join("sum", before=enter)
        assert reached(enter, cut, "/v1/control/start-run") == "403"
        assert reached(enter, cut, "/v1/runtime/acquire-task") == "403"
        assert reached(enter, cut, "/v1/fleet/pull-messages") != "403"
        run = folder / "run"
        service = cut.start(run)
        cut.wait_until(lambda status: status["sites"]["sum"]["waiting_since"] and (run / "rounds").is_dir())
        answers = (folder / "sum" / "site.log").read_text().count("job: answered")
        end = time.monotonic() + 120
        while (folder / "sum" / "site.log").read_text().count("job: answered") == answers:
            assert time.monotonic() < end
            time.sleep(0.02)
        subprocess.run(["ip", "link", "set", link, "down"], check=True)
        time.sleep(30)
        subprocess.run(["ip", "link", "set", link, "up"], check=True)
        ends(service, 0)
        assert [sorted(line["clients"]) for line in log(run)] == [list(NAMES)] * 2
        assert all(line["counted"] for line in log(run))
        braidlora("federate", cut.recipe, f"--output={folder / 'calm'}", "--json")
        assert shared(run, 2) == shared(folder / "calm", 2)
    finally:
        cut.close()
        subprocess.run(["ip", "netns", "del", name], check=False)


def test_kill_of_a_site_for_good(chaos):
    """Rounds go on without it; it is named."""
    run = chaos.folder / "lost-site"
    with patience(chaos, absence=15):
        service = chaos.start(run, "--federation.rounds=3")
        in_round_2(chaos, run)
        chaos.kill("sum")
        ends(service, 0)
    for line in log(run)[1:]:
        assert line["counted"]
        assert line["failed"]["sum"]["codes"][0] in ("late", "unreachable")
    assert "sum" in service.text()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["unscored"] == ["sum"]
    assert chaos.status()["sites"]["sum"]["left_out"] == 2
    chaos.join("sum")


def test_an_answer_after_the_deadline(chaos):
    """The round goes on without it; the site drops what it trained, and takes part in the next round."""
    run = chaos.folder / "late"
    with patience(chaos, deadline=150):
        service = chaos.start(run, "--federation.rounds=3")
        in_round_2(chaos, run)
        worker = worker_of(chaos.sites["sum"])
        os.kill(worker, signal.SIGSTOP)
        try:
            chaos.wait_until(lambda status: (run / "rounds" / "round-2").is_dir())
        finally:
            os.kill(worker, signal.SIGCONT)
        ends(service, 0)
    second, third = log(run)[1:]
    assert second["failed"]["sum"]["codes"] == ["late"]
    assert second["counted"]
    assert "loss" in third["clients"]["sum"]


def reached(enter, deployment, path):
    """The status with which the server answers a request from inside the namespace."""
    code = (
        "import ssl, sys, urllib.request, urllib.error\n"
        "context = ssl.create_default_context(cafile=sys.argv[1])\n"
        "request = urllib.request.Request(sys.argv[2], data=b'', method='POST')\n"
        "try: print(urllib.request.urlopen(request, context=context, timeout=20).status)\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
    )
    url = f"https://{deployment.host}:{deployment.port}{path}"
    command = [*enter, sys.executable, "-c", code, str(deployment.folder / "server" / "tls" / "ca.crt"), url]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
