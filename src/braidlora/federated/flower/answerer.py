"""A site's side: answers the server's messages with one base model that stays in memory."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import platform
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from braidlora import __version__
from braidlora.config import FederatedConfig
from braidlora.errors import CheckpointError, FederationError
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.flower.hello import (
    BEGIN,
    HELLO,
    Begun,
    Layer,
    Welcome,
    digest,
    recipe_problems,
    without_folder,
)
from braidlora.federated.flower.jobs import JOB, pack_reply, unpack_job
from braidlora.federated.protocol.failure import failure_of
from braidlora.federated.protocol.wire import Message, unpack, unpack_payload
from braidlora.federated.simulation.runner import Runner
from braidlora.federated.site.clients import Clients
from braidlora.federated.site.errors import keep_at_site
from braidlora.federated.site.group import Group
from braidlora.federated.site.store import FOLDER, ClientStore
from braidlora.runs import restore_all

_EXPERIMENT = re.compile(r"[0-9a-f]{16}")
_PACKAGES = ("torch", "transformers", "peft", "flwr")
Folder = Callable[[str, str], Path]  # of a client in an experiment


class Answerer:
    """Answers messages for some clients, whose rows and states are on this machine.

    Args:
        config: the recipe, as it is here.
        clients: with their rows.
        folder: where a client keeps its state, errors and results, given its name and the experiment.
        secret: keys the digests of rows that leave this machine, so that nobody can test guesses against them; None:
            they do not leave it. With a secret, the folder of the base model stays here, too.
        accept_fresh: whether a state may be set aside when the server asks to start from scratch.
        group: joins the processes that train with this one, when the base model is loaded; None: this one trains alone.
    """

    def __init__(
        self,
        config: FederatedConfig,
        clients: Clients,
        folder: Folder,
        *,
        secret: bytes | None = None,
        accept_fresh: bool = False,
        group: Callable[[], Group] | None = None,
    ) -> None:
        self._config, self._clients, self._folder = config, clients, folder
        self._secret, self._accept_fresh = secret, accept_fresh
        self._join = group
        self._runner: Runner | None = None

    def answer(self, name: str, envelope: Envelope) -> Envelope:
        """Answer a message to a client. Never raises: an error's text stays here, in the client's errors.log."""
        what = {HELLO: self._hello, BEGIN: self._begin, JOB: self._job}
        try:
            if envelope.kind not in what:
                raise FederationError(f"received a message of kind {envelope.kind[:40]!r}, which is unknown.")
            return what[envelope.kind](name, envelope)
        except Exception as error:
            failure = failure_of(error)
            # Where that is not possible, on a full disk for example, the class and the code travel nevertheless.
            with contextlib.suppress(OSError, FederationError):
                keep_at_site(error, self._folder(name, self._experiment(envelope)), self._round(envelope))
            return Envelope(envelope.kind, {"failure": {"kind": failure.kind, "code": failure.code}})

    def runner(self) -> Runner:
        """The base model, which is loaded when it is first needed and then kept."""
        if self._runner is None:
            if self._config.training.threads is not None:
                torch.set_num_threads(self._config.training.threads)
            group = self._join() if self._join is not None else None
            self._runner = Runner(self._config, self._clients, group)
        return self._runner

    def _hello(self, name: str, envelope: Envelope) -> Envelope:
        client = self._clients.by_name[name]
        facts = self.runner().facts()
        space = self._clients.label_space
        base = facts.base.model_dump(mode="json")
        if self._secret is not None:
            base["path"] = without_folder(base["path"])
        welcome = Welcome(
            client=name,
            versions=_versions(),
            differences=recipe_problems(envelope.header["recipe"], self._config),
            base=base,
            sampled=facts.sampled,
            layers=[
                Layer(name=one.name, out_features=one.out_features, in_features=one.in_features)
                for one in facts.layers
            ],
            head={key: list(tensor.shape) for key, tensor in unpack(facts.head).items()},
            head_digest=digest(facts.head),
            rank=client.rank,
            scaling=client.scaling,
            seed=client.seed,
            rows=self._rows(name),
            labels=space.task_labels if space is not None else None,
            common={task.name: len(task.test) for task in self._clients.common},
        )
        head = facts.head if envelope.header.get("send_head") is True else b""
        return Envelope(HELLO, welcome.model_dump(mode="json"), head)

    def _begin(self, name: str, envelope: Envelope) -> Envelope:
        header = envelope.header
        experiment, counted = self._experiment(envelope), header.get("counted")
        if not experiment or not isinstance(counted, int):
            raise FederationError("received a `begin` without an experiment or a round.")
        folder = self._folder(name, experiment)
        restore_all(folder / FOLDER)
        store = ClientStore(folder, name, self._config.federation.keep_rounds)
        changed = ""
        if header.get("rollback") is True and max(store.committed, store.pending) > counted:
            store.roll_back(counted)
            changed = f"went back to round {counted}, as the server did"
        if header.get("fresh") is True and (store.committed or store.pending):
            changed = self._set_aside(name, folder, store)
        if counted and counted in (store.committed, store.pending):
            store.load(counted, experiment)  # verified before anything is trained on it
        return Envelope(
            BEGIN,
            Begun(committed=store.committed, pending=store.pending, changed=changed).model_dump(mode="json"),
        )

    def _set_aside(self, name: str, folder: Path, store: ClientStore) -> str:
        if not self._accept_fresh:
            raise CheckpointError(
                f"client {name!r}: the server asks to start from a fresh state, but this site has one of round "
                f"{max(store.committed, store.pending)} in {store.folder}. If it may be set aside, start the site "
                "with --accept-fresh-state."
            )
        number = 1
        while (folder / f"{FOLDER}.set-aside-{number}").exists():
            number += 1
        store.folder.rename(folder / f"{FOLDER}.set-aside-{number}")
        return f"set its state aside as {FOLDER}.set-aside-{number}"

    def _job(self, name: str, envelope: Envelope) -> Envelope:
        experiment = self._experiment(envelope)
        if not experiment:
            raise FederationError("received a job without an experiment.")
        job = unpack_job(envelope, name, self._folder(name, experiment))
        return pack_reply(self.runner().run(job))

    def _experiment(self, envelope: Envelope) -> str:
        """The experiment of a message, which names a folder here; empty if it has none.

        Raises:
            FederationError: it is not an experiment's id.
        """
        experiment = envelope.header.get("experiment")
        if envelope.kind == JOB and isinstance(payload := envelope.header.get("payload"), str):
            experiment = unpack_payload(Message(payload.encode(), b"")).experiment
        if experiment is None:
            return ""
        if not isinstance(experiment, str) or not _EXPERIMENT.fullmatch(experiment):
            raise FederationError(f"received an experiment's id that is not one: {str(experiment)[:40]!r}.")
        return experiment

    @staticmethod
    def _round(envelope: Envelope) -> int:
        """The round of a job; 0 for other messages."""
        if envelope.kind != JOB:
            return 0
        return unpack_payload(Message(str(envelope.header.get("payload")).encode(), b"")).round

    def _rows(self, name: str) -> dict[str, dict[str, dict[str, Any]]]:
        """How many rows the client has of each task, and their digests; not which answers they have."""
        tasks: Mapping[str, Any] = self._clients.report()[name]["tasks"]
        return {
            task: {
                part: {"rows": one["rows"], "sha256": self._keyed(one["sha256"])}
                for part, one in parts.items()
            }
            for task, parts in tasks.items()
        }

    def _keyed(self, sha256: str) -> str:
        if self._secret is None:
            return sha256
        return hmac.new(self._secret, sha256.encode(), hashlib.sha256).hexdigest()


def _versions() -> dict[str, str]:
    found = {"braidlora": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
