"""What an aggregation rule is, as data that recipes, plans, the guard and clients read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from braidlora.federated.protocol.factors import FACTORED, LORA, PAIR


class Turn(NamedTuple):
    """The factors that are trained in a round, sent up in it, and sent down after it."""

    trains: tuple[str, ...]
    uploads: tuple[str, ...]
    downloads: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RuleSpec:
    """A rule: what a client trains, what is sent, and what the aggregate can be expected to be.

    A rule that averages each factor by itself needs nothing else. Factors are those of `federated.protocol.factors`.

    Args:
        name: as recipes spell it.
        label: as papers spell it.
        trains: factors that a client trains.
        uploads, downloads: factors that clients upload and download; nothing else may be sent.
        turns: of a rule that alternates: round t, counted from 1, follows entry (t − 1) mod n. `trains`, `uploads` and
            `downloads` are then those of all turns together.
        adapter: the form of a client's adapter: PEFT's LoRA, FactoredLora, or a pair of LoRAs with a router, of which
            one is the client's own.
        carried: factors of earlier rounds' updates that clients and server keep, frozen, next to the adapter.
        restarts: factors that a client draws again at the start of each round.
        ranks: "equal" for all clients, or "any".
        one_scaling: whether factors are averaged, which requires the same scaling alpha / r for all clients.
        exact: whether the aggregate's effective update is Σ pᵢ ΔWᵢ; None where a factor stays with its client, so that
            there is no single update to compare with.
        streams: whether the server's memory is constant in the number of clients.
        needs_shared_init: whether all clients must start from the same factors.
        multiplies: factors of which the server forms products, so that their values are bounded.
        payload_by_rank: whether clients of different ranks or scalings are sent different tensors.
        robust: whether an aggregator that tolerates malicious clients may replace the mean.
        not_robust: why not, where it is not that updates differ in shape.
        no_momentum: why the server may not continue its last steps (`federation.server_momentum`); empty if it may.
        no_privacy: why noise on an average of clipped changes (`federation.privacy`) gives no guarantee; empty if it
            does.
        least_clients: how many clients a federation needs.
        settings: further arguments of the rule's class: keys of the recipe's section `federation`; `max_rank`, the
            largest rank of all clients; `levels`, all their ranks.
        wires: the values of `federation.wire` that it knows, the first one being the default.
        implementation: `module:Class` of the class that aggregates; by default each factor is averaged.
    """

    name: str
    label: str
    trains: tuple[str, ...] = LORA
    uploads: tuple[str, ...]
    downloads: tuple[str, ...]
    turns: tuple[Turn, ...] = ()
    adapter: Literal["lora", "factored", "pair"] = "lora"
    carried: tuple[str, ...] = ()
    restarts: tuple[str, ...] = ()
    ranks: Literal["equal", "any"] = "equal"
    one_scaling: bool = True
    exact: bool | None = None
    streams: bool = True
    needs_shared_init: bool = False
    multiplies: tuple[str, ...] = ()
    payload_by_rank: bool = False
    robust: bool = True
    not_robust: str = ""
    no_momentum: str = ""
    no_privacy: str = ""
    least_clients: int = 1
    settings: tuple[str, ...] = ()
    wires: tuple[str, ...] = ()
    implementation: str = "braidlora.federated.protocol.rules.rule:Rule"

    def at(self, round: int) -> Turn:
        """What is trained and what is sent in a round, counted from 1; with 0 in all rounds together."""
        if self.turns and round:
            return self.turns[(round - 1) % len(self.turns)]
        return Turn(self.trains, self.uploads, self.downloads)

    @property
    def factors(self) -> tuple[str, ...]:
        """The factors that a client's adapter consists of."""
        return {"lora": LORA, "factored": FACTORED, "pair": PAIR}[self.adapter]

    @property
    def keeps(self) -> tuple[str, ...]:
        """The factors that make up the server's shared state."""
        return (*self.downloads, *self.carried)

    @property
    def stays(self) -> tuple[str, ...]:
        """The trained factors that stay with their client from round to round."""
        return tuple(f for f in self.trains if f not in self.downloads and f not in self.restarts)

    @property
    def pulled(self) -> tuple[str, ...]:
        """The trained factors that start a round as the server sent them, to which FedProx pulls them back."""
        return tuple(f for f in self.trains if f in self.downloads and f not in self.restarts)

    @property
    def shares(self) -> bool:
        """Whether anything is sent."""
        return bool(self.uploads)

    @property
    def starts_over(self) -> bool:
        """Whether a client draws all that it trains again in each round."""
        return set(self.trains) <= set(self.restarts)
