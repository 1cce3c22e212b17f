"""The processes of a site that train along with its worker, one per GPU. They read no messages and write nothing.

They find each other by a file in the worker's private folder, and listen on the loopback address alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from braidlora.errors import BraidloraError, ConfigError, DataError, TrainingError
from braidlora.federated.flower import programs
from braidlora.federated.flower.settings import SITE_FILE, SiteSettings, read_site
from braidlora.federated.flower.site_recipe import site_config
from braidlora.terminal import say

_LOOK = 0.2  # seconds


def check_devices(folder: Path, settings: SiteSettings) -> None:
    """Reject more processes than this machine has GPUs; without a GPU, or with `device: cpu`, they share the CPU.

    Raises:
        ConfigError: names both numbers.
    """
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else None
    if there is not None and settings.processes > there:
        raise ConfigError(
            f"{folder / SITE_FILE}: processes is {settings.processes}, but this machine has {there} "
            f"{'GPU' if there == 1 else 'GPUs'}; set processes: {there}, or device: cpu."
        )


def start_followers(folder: Path, number: int, store: Path) -> None:
    """Start processes 1 to `number` - 1, and make this one process 0. If one of them ends, this one ends too.

    Args:
        folder: the site's.
        number: of processes, with this one.
        store: a file in a folder that only this user can reach, where they find each other.
    """
    loopback = "lo" if sys.platform == "linux" else "lo0"
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    os.environ |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "RANK": "0", "LOCAL_RANK": "0"}
    store.unlink(missing_ok=True)
    followers = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(store)],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            preexec_fn=programs.end_with_parent if sys.platform == "linux" else None,
        )
        for rank in range(1, number)
    ]
    threading.Thread(target=_end_with_any, args=(followers,), daemon=True).start()


def _end_with_any(followers: Sequence[subprocess.Popen[bytes]]) -> None:
    while True:
        for rank, follower in enumerate(followers, 1):
            code = follower.poll()
            if code is None:
                continue
            if code not in (ConfigError.exit_code, DataError.exit_code):  # it has said what is wrong
                say(
                    f"braidlora site: process {rank} ended with code {code}; the worker ends as well",
                    file=sys.stderr,
                    flush=True,
                )
            for other in followers:
                other.kill()
            os._exit(code if code > 0 else TrainingError.exit_code)
        time.sleep(_LOOK)


def main(folder: Path, store: Path) -> int:
    """Load the site's rows and base model, and train along with the worker until it ends."""
    from braidlora.federated.flower.site_answerer import site_clients
    from braidlora.federated.site.follow import follow
    from braidlora.federated.site.group import Group
    from braidlora.training.threads import cpu_threads

    os.umask(0o077)
    programs.end_with(os.getppid())
    try:
        settings = read_site(folder)
        config = site_config(folder, settings)
        clients = site_clients(settings.name, config)
        with cpu_threads(config.training.threads):
            follow(Group(store), config, clients)
    except BraidloraError as error:
        say(f"braidlora site: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
