"""A deployment on this machine, through the command line: a server, three sites, each a process with its own folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

NAMES = ("mood", "rising", "sum")
SOURCE = Path(__file__).parents[2] / "src"
FIRST_USER = 20_001  # of the sites; no such user need exist
_UP_WITHIN = 240.0


def recipe(**federation):
    """Three clients of one generated task each."""
    limit = {"train": 60, "test": 20}
    return {
        "model": {"path": "embedded"},
        "adapter": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
        "tasks": [
            {"name": name} | {part: {"source": f"generated:{name}", "limit": n} for part, n in limit.items()}
            for name in NAMES
        ],
        "federation": {
            "rounds": 3,
            "local": {"epochs": 1},
            "min_clients": 2,
            "evaluate_every": 0,
            **federation,
        },
        "prompt": {"template": "{instruction} =", "cutoff": 64},
        "training": {"batch_size": 8, "learning_rate": 5e-3, "scheduler": "constant", "threads": 1},
        "evaluation": {"batch_size": 100, "max_new_tokens": 8},
        "output": "unused",
    }


def environment(**more):
    return {
        **os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", **more,
    }  # fmt: skip


def braidlora(*words, python=sys.executable, check=True, timeout=600, **options):
    """Run the command line to its end."""
    done = subprocess.run(
        [str(python), "-m", "braidlora", *map(str, words)],
        env=environment(**options.pop("env", {})),
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )
    assert not check or done.returncode == 0, done.stderr[-4000:] + done.stdout[-1000:]
    return done


class Service:
    """A command that runs until it is stopped; its output goes to a file."""

    def __init__(self, words, log, *, python=sys.executable, before=(), env=None):
        self.log = log
        with open(log, "ab") as file:
            self._from = file.tell()
            self.process = subprocess.Popen(
                [*before, str(python), "-m", "braidlora", *map(str, words)],
                env=environment(**(env or {})),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self):
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    def wait_for(self, *texts, within=_UP_WITHIN):
        end = time.monotonic() + within
        while not all(text in self.text() for text in texts):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.2)

    def stop(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(60)
        return self.process.returncode


class Deployment:
    """A server's folder, sites' folders, and the processes in them.

    Args:
        folder: of all.
        port: the SuperLink's; the sites' own come after it.
        python: the interpreter of the sites.
        users: whether sites run as users of their own.
        settings: of server.yaml.
    """

    def __init__(
        self,
        folder,
        port,
        *,
        python=sys.executable,
        users=False,
        host="127.0.0.1",
        settings=None,
        **federation,
    ):
        self.folder, self.port, self.host, self.python, self.users = folder, port, host, python, users
        self.sites, self.server, self.running = {}, None, []
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe(**federation)))
        listen = () if host == "127.0.0.1" else ("--host", "0.0.0.0", "--reached-as", host)
        braidlora("site", "init", folder / "server", "--server", "--port", port, *listen)
        if settings:
            path = folder / "server" / "server.yaml"
            path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **settings}))
        for number, name in enumerate(NAMES, 1):
            self.init_site(name, number)
            braidlora("site", "add", folder / "server", name, folder / name / "node.pub")

    def init_site(self, name, number, folder=None):
        folder = folder or self.folder / name
        braidlora(
            "site", "init", folder, "--name", name, "--superlink", f"{self.host}:{self.port}",
            "--recipe", self.recipe, "--ca", self.folder / "server" / "tls" / "ca.crt",
            "--port", self.port + number,
        )  # fmt: skip
        if self.users:
            user = FIRST_USER + number
            for path in [folder, *folder.rglob("*")]:
                os.chown(path, user, user)

    def serve(self, before=()):
        self.server = Service(
            ("site", "serve", self.folder / "server"), self.folder / "serve.log", before=before
        )
        self.running.append(self.server)
        self.server.wait_for("listening", *(f"{name}: key" for name in NAMES))

    def join(self, *names, before=(), env=None, wait=True, options=()):
        for name in names or NAMES:
            folder = self.folder / name
            command = []
            if self.users:
                user = str(folder.stat().st_uid)
                command = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"]
            self.sites[name] = Service(
                ("site", "join", folder, *options),
                self.folder / f"{name}.log",
                python=self.python,
                before=(*before, *command),
                env={"HOME": str(folder), **(env or {})},
            )
            self.running.append(self.sites[name])
        for name in names or NAMES if wait else ():
            self.sites[name].wait_for(f"{name}: connected")

    def federate(self, output, *words, check=True, **options):
        return braidlora(*self._words(output, words), check=check, **options)

    def start(self, output, *words):
        """`federate` in the background."""
        service = Service(self._words(output, words), self.folder / f"{Path(output).name}.log")
        self.running.append(service)
        return service

    def _words(self, output, words):
        return (
            "federate", self.recipe, "--engine", "flower", "--site", self.folder / "server",
            f"--output={output}", *words,
        )  # fmt: skip

    def status(self):
        return json.loads(braidlora("site", "status", self.folder / "server", "--json").stdout)

    def wait_until(self, what, within=_UP_WITHIN):
        """Wait until a function of the status file is true."""
        end = time.monotonic() + within
        while True:
            try:
                status = json.loads((self.folder / "server" / "status.json").read_text())
                if what(status):
                    return status
            except (OSError, ValueError):
                pass
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.02)

    def state(self, name):
        [found] = (self.folder / name / "federations").glob("*/state")
        return found

    def kill(self, name):
        """SIGKILL to a site's own process; its children end with it."""
        self.sites[name].process.kill()
        self.sites[name].process.wait()

    def close(self):
        for service in reversed(self.running):
            service.stop()


def log(run):
    return [json.loads(line) for line in (Path(run) / "rounds.jsonl").read_text().splitlines()]


def shared(run, round):
    return (Path(run) / "rounds" / f"round-{round}" / "shared.safetensors").read_bytes()


def processes_below(folder):
    """Processes whose command names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words and int(path.parent.name) != os.getpid() and "pytest" not in words:
            found.append(words)
    return found


def foreign_python(folder):
    """An interpreter that other users can run, with the packages of this one; None if there is none."""
    if os.name != "posix" or os.getuid() != 0 or shutil.which("setpriv") is None:
        return None
    here = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = next(path for path in sys.path if path.endswith("site-packages"))
    for python in (sys.executable, f"/usr/bin/{here}", "/usr/bin/python3"):
        if not Path(python).exists():
            continue
        made = subprocess.run(
            [python, "-m", "venv", "--without-pip", str(folder)], capture_output=True, check=False
        )
        target = folder / "lib" / here / "site-packages"
        if made.returncode == 0 and target.is_dir():
            (target / "all.pth").write_text(f"{site}\n{SOURCE}\n")
            user = str(FIRST_USER)
            command = [
                "setpriv",
                "--reuid",
                user,
                "--regid",
                user,
                "--clear-groups",
                str(folder / "bin" / "python"),
            ]
            test = subprocess.run(
                [*command, "-c", "import os, subprocess, sys, braidlora, flwr, torch;"
                 "assert os.getuid(); subprocess.run([sys.executable, '-c', ''], check=True)"],
                capture_output=True, check=False, cwd="/",
            )  # fmt: skip
            if test.returncode == 0:
                return folder / "bin" / "python"
        shutil.rmtree(folder, ignore_errors=True)
    return None
