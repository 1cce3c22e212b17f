"""How FedALT averages, and how a client takes its own part out of the mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from braidlora.federated.protocol.change import Change, difference
from braidlora.federated.protocol.factors import LORA, REST, join, split
from braidlora.federated.protocol.rules.rule import Part, Rule
from braidlora.federated.protocol.update import ClientUpdate

_REST_OF = dict(zip(LORA, REST, strict=True))
_LORA_OF = dict(zip(REST, LORA, strict=True))


class FedALT(Rule):
    """y = W0 x + s (w₁(x) Bᵢ Aᵢ + w₂(x) B_R A_R) x with w = softmax(W_g x) (Bian et al., arXiv 2503.11880).

    A client trains and keeps Aᵢ, Bᵢ and the mixer W_g, and sends Aᵢ and Bᵢ. A_R and B_R, which are frozen, are the mean
    of the other clients': all are sent the same mean Ā over those that took part, and a client that did forms
    (Ā − pᵢ Aᵢ) / (1 − pᵢ) from what it sent and its weight pᵢ. In the first round B_R is zero.

    The shared state holds the means as `rest_A` and `rest_B`. A change is measured against them: what a client trained
    on from is known to nobody else.
    """

    def _accumulate(self, update: ClientUpdate, weight: float) -> None:
        self._aggregator.add({_as(name, _REST_OF): t for name, t in update.tensors.items()}, weight)

    def _result(self) -> dict[str, Tensor]:
        return self._aggregator.finish()

    def _expectation(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int | None, ...]]:
        return super()._expectation({_as(name, _LORA_OF): shape for name, shape in shapes.items()})

    def change(self, update: ClientUpdate, before: Mapping[str, Tensor]) -> Change:
        """An update minus the mean that all were sent; in the first round minus the common start."""
        for name, tensor in update.tensors.items():
            yield _as(name, _REST_OF), difference(tensor.detach(), _start(name, before))

    def moved(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Change:
        """The new mean minus the one before, or in the first round minus the common start."""
        for name, tensor in after.items():
            yield name, difference(tensor, _start(_as(name, _LORA_OF), before))

    @torch.no_grad()
    def received(
        self,
        payload: Mapping[str, Tensor],
        rank: int,
        own: Mapping[str, Tensor] | None = None,
        *,
        full: bool = False,
        part: Part | None = None,
    ) -> dict[str, Tensor]:
        """The mean of the others' A and B; nothing if the client was the only one in that round."""
        rest = {}
        for name, mean in payload.items():
            sent = part.sent.get(_as(name, _LORA_OF)) if part is not None else None
            if part is None or sent is None or name in self.also_share:
                rest[name] = mean
            elif part.weight < 1.0:
                value = (mean.double() - part.weight * sent.double()) / (1.0 - part.weight)
                rest[name] = value.to(mean.dtype)
        return rest


def _as(name: str, factors: Mapping[str, str]) -> str:
    """The name with its factor replaced; itself for other tensors."""
    layer, factor = split(name)
    return join(layer, factors[factor]) if factor in factors else name


def _start(name: str, before: Mapping[str, Tensor]) -> Tensor | None:
    """What a tensor of an update is a change of: the common start, which only the first round has, or the mean."""
    return before[name] if name in before else before.get(_as(name, _REST_OF))
