"""The layout of a federation's run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from braidlora.runs._commit import restore_all
from braidlora.runs._directory import Inside, RunDirectory
from braidlora.runs._manifest import MANIFEST
from braidlora.runs._names import ENVIRONMENT, LABELS, METRICS, RECIPE, ROLLED_BACK


@dataclass(frozen=True)
class FederatedDirectory(RunDirectory):
    """The files of one federation. The last rounds are kept; each is complete or absent.

    config.yaml  environment.json  experiment.json  labels.json     what was run, on what
    partition.json  partition_rows.jsonl  figures/                  who has which rows
    rounds/round-N/shared.safetensors                               what all share
    rounds/round-N/server.json, rounds.jsonl                        who counted when, and the log so far
    clients/NAME/state/round-N/, pending-N/                         what a client keeps to itself, after its round N
    rounds.jsonl                                                    one line per round
    privacy.jsonl                                                   one line per release of noise
    rolled_back.json                                                clients whose sites have yet to go back
    clients/NAME/adapter/                                           the result, in PEFT format
    clients/NAME/predictions/TASK.jsonl  metrics.json               its evaluation; metrics.json is written last
    report.html                                                     all of it on one page
    """

    experiment = Inside("experiment.json")
    partition = Inside("partition.json")
    partition_rows = Inside("partition_rows.jsonl")
    log = Inside("rounds.jsonl")
    privacy = Inside("privacy.jsonl")
    rolled_back = Inside(ROLLED_BACK)
    checkpoints = Inside("rounds")
    clients = Inside("clients")
    figures = Inside("figures")

    FILES: ClassVar = (
        RECIPE, ENVIRONMENT, "experiment.json", LABELS, "partition.json",
        "partition_rows.jsonl", "rounds.jsonl", "privacy.jsonl", ROLLED_BACK, METRICS, "report.html",
        MANIFEST,
    )  # fmt: skip
    BEGINNING: ClassVar = FILES[:6]  # written before the first round
    FOLDERS: ClassVar = ("rounds", "clients", "figures")
    STEP: ClassVar = "round"
    FEDERATED: ClassVar = True

    def client(self, name: str) -> Path:
        return self.clients / name

    def client_adapters(self) -> dict[str, Path]:
        """The clients' adapters by name: of the federation's clients, and of those added later.

        Other folders in `clients/` are ignored, including those of clients that have left.

        Raises:
            CheckpointError: partition.json or the record of an added client is damaged.
        """
        members = self.read_json(self.partition.name) if self.partition.is_file() else {}
        found = {}
        for folder in sorted(self.clients.iterdir()) if self.clients.is_dir() else []:
            adapter = folder / "adapter"
            linked = folder.is_symlink() or adapter.is_symlink()
            if adapter.is_dir() and not linked and (folder.name in members or self.was_added(folder.name)):
                found[folder.name] = adapter
        return found

    def was_added(self, client: str) -> bool:
        """Whether `add-client` wrote this client's folder."""
        if not (self.client(client) / "added.json").is_file():
            return False
        added = self.read_json(f"clients/{client}/added.json")
        return isinstance(added, dict) and added.get("client") == client

    def checkpoint_steps(self) -> list[int]:
        """The numbers of committed rounds, oldest first."""
        return [number for number in super().checkpoint_steps() if self.checkpoint(number).is_dir()]

    def restore(self) -> None:
        """Restore folders that a killed process had set aside to replace them."""
        super().restore()
        if self.clients.is_dir():
            for client in self.clients.iterdir():
                restore_all(client)
                restore_all(client / "state")
