"""Differential privacy for whole clients: clipped changes, and Gaussian noise on their sum or on each of them.

With the noise at the server, θ ← θ + (Σ clip_C(Δᵢ) + C z ξ) / (q N), where ξ is standard normal, q the probability with
which each of N clients is drawn, and clip_C(Δ) = Δ min(1, C / ‖Δ‖) over all that a client sends together (McMahan et
al., arXiv 1710.06963). The divisor is the expected number of clients, because the actual one depends on who was drawn.
With the noise at the clients, each adds C z ξᵢ to its own clipped change before sending it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from braidlora.config import FederatedConfig
from braidlora.federated.protocol.entropy import Entropy, entropy, normal, poisson_sample
from braidlora.federated.protocol.mean import accumulation_dtype


@dataclass(frozen=True)
class Mechanism:
    """What the noise of a round is, and who takes part in it.

    Args:
        clip: C.
        noise_multiplier: z.
        sampling: q, the probability with which a client is drawn.
        clients: N.
        at_clients: whether every client adds noise to its own change, instead of the server to the sum.
        seed: of the noise, for tests; None: the operating system's entropy.
    """

    clip: float
    noise_multiplier: float
    sampling: float
    clients: int
    at_clients: bool = False
    seed: int | None = None

    @property
    def expected(self) -> float:
        """q N, by which the sum is divided."""
        return self.sampling * self.clients

    def entropy(self, *parts: str | int) -> Entropy:
        """The source of random numbers for a purpose."""
        return entropy(self.seed, *parts)

    def sample(self, names: list[str], round: int) -> list[str]:
        """The clients of a round, each drawn with probability q; possibly none."""
        return poisson_sample(self.entropy("sample", round), sorted(names), self.sampling)


def sampling_rate(config: FederatedConfig) -> float:
    """q of a recipe."""
    sample = config.federation.sample
    return 1.0 if sample is None or sample.fraction is None else sample.fraction


class NoisyMean:
    """The aggregator: (Σ clip_C(Δᵢ) + C z ξ) / (q N), added to what the clients started from. Weights are ignored.

    Args:
        mechanism: C, z, q and N. With the noise at the clients, the changes are summed as they come.

    Attributes:
        round: number of the round, for seeded noise.
        clipped: by how many clients the bound was exceeded in this round.
    """

    measures_change = True

    def __init__(self, mechanism: Mechanism) -> None:
        self.mechanism = mechanism
        self.round = 0
        self.clipped = 0
        self._shapes: dict[str, tuple[int, ...]] = {}

    def start(self, reference: Mapping[str, Tensor]) -> None:
        self._reference, self._sum, self.clipped = dict(reference), dict[str, Tensor](), 0

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """What will be summed, by name: all of it gets noise, even if no client takes part."""
        self._shapes = dict(shapes)
        self._sum = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        changes, norm = changes_of(tensors, self._reference)
        assert {name: tuple(one.shape) for name, one in changes.items()} == self._shapes
        if not self.mechanism.at_clients:
            self.clipped += norm > self.mechanism.clip
            clip(changes, norm, self.mechanism.clip)
        for name, change in changes.items():
            self._sum[name] += change

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """The new values in float32, or in float64 if the clients started from that."""
        sums, mechanism = self._sum, self.mechanism
        if not mechanism.at_clients:
            add_noise(sums, mechanism, mechanism.entropy("noise", self.round))
        result = {}
        for name, total in sums.items():
            step, start = total / mechanism.expected, self._reference.get(name)
            dtype = torch.float32 if start is None else accumulation_dtype(start)
            result[name] = (step if start is None else start.double() + step).to(dtype)
        self._reference, self._sum = {}, {}
        return result


def private_update(
    tensors: Mapping[str, Tensor], start: Mapping[str, Tensor], mechanism: Mechanism, client: str, round: int
) -> dict[str, Tensor]:
    """What a client sends if it adds the noise: its start, plus its clipped change, plus C z ξ, in float32.

    Args:
        tensors: what it would send.
        start: the same before it trained.
    """
    changes, norm = changes_of(tensors, start)
    clip(changes, norm, mechanism.clip)
    add_noise(changes, mechanism, mechanism.entropy("noise", client, round))
    return {name: (start[name].double() + change).float() for name, change in changes.items()}


@torch.no_grad()
def changes_of(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The changes in float64, and their norm over all tensors together. Names missing in `start` started at zero."""
    changes = {}
    for name, tensor in tensors.items():
        change = tensor.detach().cpu().to(torch.float64, copy=True)
        if name in start:
            change -= start[name].detach().cpu().double()
        changes[name] = change
    norm = math.sqrt(math.fsum(float(change.square().sum()) for change in changes.values()))
    return changes, norm


def clip(changes: Mapping[str, Tensor], norm: float, limit: float) -> None:
    """Scale the changes down, in place, to a norm of at most `limit`."""
    if norm > limit:
        for change in changes.values():
            change *= limit / norm


def add_noise(values: Mapping[str, Tensor], mechanism: Mechanism, source: Entropy) -> None:
    """Add C z ξ, in place, tensor by tensor in the order of names."""
    deviation = mechanism.clip * mechanism.noise_multiplier
    if not deviation:
        return
    for name in sorted(values):
        noise = torch.from_numpy(normal(source, values[name].numel()))
        values[name] += deviation * noise.view(values[name].shape)
