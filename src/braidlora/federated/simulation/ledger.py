"""The ledger of a private federation: what was released, on disk before anyone can see it, and the ε it has spent."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from braidlora.config import FederatedConfig, PrivacySection
from braidlora.errors import CheckpointError, FederationError
from braidlora.federated.protocol.accountant import Release, Spent, spent
from braidlora.federated.protocol.privacy import Mechanism
from braidlora.json_text import loads
from braidlora.runs import FederatedDirectory, atomic_write_text

_SLACK = 1e-6  # relative; the budget was calibrated to within the accountant's rounding


class Ledger:
    """`privacy.jsonl`: a line per release. Lines are only ever added: a rollback does not undo what was seen.

    Args:
        directory: of the federation.
        section: the recipe's.
        mechanism: what each round releases.
        releases: those of earlier processes.
        may_shorten: whether the federation may end after fewer rounds.

    Attributes:
        releases: all so far.
    """

    def __init__(
        self,
        directory: FederatedDirectory,
        section: PrivacySection,
        mechanism: Mechanism,
        releases: Sequence[Release] = (),
        may_shorten: bool = True,
    ) -> None:
        self._path, self._section, self._mechanism = directory.privacy, section, mechanism
        self.releases, self._may_shorten = list(releases), may_shorten

    def begin(self, round: int, sampled: Collection[str]) -> None:
        """Reject a round that the budget does not allow; with the noise at the clients, note what they will send.

        Raises:
            FederationError: says what it would spend, and what to do.
        """
        budget, mechanism = self._section.epsilon, self._mechanism
        if budget is not None:
            after = self._spent([*self.releases, self._release(round, "aggregate", ())]).epsilon
            if after is None or after > budget * (1 + _SLACK):
                so_far = self.spent().epsilon or 0.0
                extra = len(self.releases) - (round - 1)
                again = f" {extra} of its releases are of rounds that were repeated." if extra > 0 else ""
                more = "llow more (--federation.privacy.epsilon=… --resume auto)."
                shorter = (
                    f"Finish with what there is (--federation.rounds={round - 1} --resume auto), or a{more}"
                )
                raise FederationError(
                    f"round {round} is not run: ε would be {_shown(after)}, and federation.privacy.epsilon allows "
                    f"{budget:g}; {len(self.releases)} releases have spent {so_far:.4g}.{again} "
                    + (shorter if self._may_shorten and round > 1 else f"A{more}")
                )
        if mechanism.at_clients and sampled:
            self._add(self._release(round, "sent", sampled))

    def release(self, round: int, clients: Collection[str]) -> None:
        """Note the aggregate of a round, before it is computed.

        Args:
            clients: those whose updates it sums.
        """
        self._add(self._release(round, "aggregate", clients if self._mechanism.at_clients else ()))

    def spent(self) -> Spent:
        """ε of all releases so far."""
        return self._spent(self.releases)

    def report(self) -> dict[str, Any]:
        """What rounds.jsonl, metrics.json and the report show."""
        section, mechanism, found = self._section, self._mechanism, self.spent()
        counts = not found.why_no_guarantee
        report: dict[str, Any] = {
            "guarantee": counts,
            "epsilon": found.epsilon if counts else None,
            "epsilon_server": found.epsilon_server if counts else None,
            "delta": section.delta,
            "neighbors": found.neighbors,
            "releases": found.releases,
            "noise": section.noise,
            "noise_multiplier": mechanism.noise_multiplier,
            "clip": mechanism.clip,
            "sampling": mechanism.sampling,
            "clients": mechanism.clients,
        }
        if not counts:
            report["why_not"] = found.why_no_guarantee
            report["epsilon_if_secret"] = found.epsilon
        if section.epsilon is not None:
            report["budget"] = section.epsilon
        return report

    def check(self, committed: int) -> None:
        """Raise CheckpointError if a committed round released more than the ledger has."""
        if len(self.releases) < committed:
            raise CheckpointError(
                f"{self._path}: {'is missing' if not self._path.exists() else f'has {len(self.releases)} releases'}, "
                f"but the last round was committed after {committed}, so ε is not known. Restore the file from a copy; "
                "without it this federation cannot continue."
            )

    def _spent(self, releases: Sequence[Release]) -> Spent:
        return spent(releases, self._section.delta, at_clients=self._mechanism.at_clients)

    def _release(self, round: int, what: Any, clients: Collection[str]) -> Release:
        one = self._mechanism
        names = tuple(sorted(clients))
        return Release(round, what, one.noise_multiplier, one.sampling, names, one.seed is None)

    def _add(self, release: Release) -> None:
        self.releases.append(release)
        atomic_write_text(self._path, "".join(json.dumps(asdict(one)) + "\n" for one in self.releases))


def read_releases(directory: FederatedDirectory) -> list[Release]:
    """The releases in a run directory; none if there is no ledger.

    Raises:
        CheckpointError: the ledger is damaged.
    """
    path = directory.privacy
    if not path.is_file():
        return []
    releases = []
    for number, line in enumerate(directory.read(path.name).decode("utf-8", "replace").splitlines(), 1):
        try:
            found = loads(line)
            one = Release(**found)
            releases.append(replace(one, clients=tuple(one.clients)))
        except (ValueError, TypeError):
            raise _damaged(path, number) from None
    return releases


def begun_with(config: FederatedConfig, releases: Sequence[Release]) -> float | None:
    """The noise multiplier of a federation that continues; None if the recipe says it, or nothing was released."""
    section = config.federation.privacy
    if section is None or section.noise_multiplier is not None or not releases:
        return None
    return releases[-1].noise_multiplier


def _damaged(path: Path, number: int) -> CheckpointError:
    return CheckpointError(
        f"{path}:{number}: is damaged, so ε is not known. Restore the file from a copy; without it this federation "
        "cannot continue."
    )


def _shown(epsilon: float | None) -> str:
    return "infinite" if epsilon is None else f"{epsilon:.4g}"
