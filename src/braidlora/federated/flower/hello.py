"""The handshake: server and site compare what must be equal before any round, and a site says what it has.

`hello` settles the recipe, the base model, the layers and the client; `begin` the experiment and the client's state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from braidlora.config import NOTHING, FederatedConfig, is_default, recipe_differences
from braidlora.errors import FederationError
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.protocol.clients import ClientSpec
from braidlora.federated.protocol.factors import AdaptedLayer
from braidlora.federated.protocol.failure import Failure
from braidlora.federated.simulation.resume import fixed_recipe
from braidlora.models.identity import base_differences
from braidlora.runs import BaseRecord

HELLO, BEGIN = "hello", "begin"
# Keys of the recipe that a site sets for itself: where files are, and how it computes. They are reported.
SITES_OWN = (
    "model.path", "model.revision", "model.gguf_file", "model.dtype", "model.quantization",
    "training.batch_size", "training.gradient_accumulation", "training.gradient_checkpointing",
    "training.precision",
)  # fmt: skip
Text = Annotated[str, StringConstraints(max_length=4096)]
Count = Annotated[int, Field(ge=0, le=2**53)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Difference(_Part):
    """A key of the recipe with the server's and the site's value."""

    key: Text
    server: Any = None
    site: Any = None


class Layer(_Part):
    """An adapted layer."""

    name: Text
    out_features: Count
    in_features: Count


class Welcome(_Part):
    """A site's answer to `hello`.

    Attributes:
        client: the name that the site answers to.
        versions: of packages at the site.
        differences: where its recipe differs from the server's.
        base: its base model.
        sampled: the fingerprint of the base as of braidlora 0.1.
        layers: the adapted layers.
        head: by name, the shapes of tensors that are trained in full.
        head_digest: sha256 of their initial values.
        rank, scaling, seed: the client's.
        rows: as `partition.json` has them, with digests that are keyed by a secret of the site.
        labels: of all `classify` tasks.
        common: tasks of the common test, with the number of rows.
    """

    client: Text
    versions: dict[Text, Text]
    differences: list[Difference]
    base: dict[str, Any]
    sampled: Text
    layers: list[Layer]
    head: dict[Text, list[Count]]
    head_digest: Text
    rank: Count
    scaling: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    seed: Count
    rows: dict[Text, dict[Text, dict[str, Any]]]
    labels: dict[Text, list[Text]] | None = None
    common: dict[Text, Count] = {}
    failure: None = None


class Begun(_Part):
    """A site's answer to `begin`: the rounds of its states, and whether it went back to an earlier or a fresh one."""

    committed: Count
    pending: Count
    changed: Text = ""
    failure: None = None


def hello(config: FederatedConfig, *, send_head: bool) -> Envelope:
    """The server's first message."""
    return Envelope(HELLO, {"recipe": shared_recipe(config), "send_head": send_head})


def shared_recipe(config: FederatedConfig) -> dict[str, Any]:
    """What of a recipe must be the same at the server and at all sites."""
    recipe = fixed_recipe(config)
    for key in SITES_OWN:
        section, _, name = key.partition(".")
        recipe.get(section, {}).pop(name, None)
    return recipe


def recipe_problems(server: Mapping[str, Any], site: FederatedConfig) -> list[Difference]:
    """Where a site's recipe differs from the one that the server sent."""
    found = recipe_differences(dict(server), shared_recipe(site), FederatedConfig)
    return [
        Difference(key=key, server=then, site=now)
        for key, then, now in found
        # A key that the site's version does not know is no difference while it has its default.
        if not (now == NOTHING and is_default(FederatedConfig, key, then))
    ]


def read_answer(envelope: Envelope, kind: type[Welcome] | type[Begun]) -> Any:
    """A site's answer: `kind`, or its failure.

    Raises:
        FederationError: it is neither.
    """
    failure = envelope.header.get("failure")
    if isinstance(failure, dict):
        code, name = failure.get("code"), failure.get("kind")
        return Failure(str(name)[:80], str(code)[:80])
    try:
        return kind.model_validate(envelope.header)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise FederationError(
            f"the answer to {envelope.kind[:20]!r} is not valid: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None


@dataclass(frozen=True)
class Reference:
    """What all sites must agree on, as the first one has it.

    Args:
        site: its name.
        base: its base model; `sampled` is the fingerprint as of braidlora 0.1.
        layers, head, head_digest, labels: as in `Welcome`.
    """

    site: str
    base: BaseRecord
    sampled: str
    layers: list[AdaptedLayer]
    head: dict[str, list[int]]
    head_digest: str
    labels: dict[str, list[str]] | None

    @classmethod
    def of(cls, name: str, welcome: Welcome) -> Reference:
        """From a site's answer; raises FederationError if its record of the base is not valid."""
        return cls(
            name,
            _base(name, welcome),
            welcome.sampled,
            [AdaptedLayer(one.name, one.out_features, one.in_features) for one in welcome.layers],
            {key: list(shape) for key, shape in welcome.head.items()},
            welcome.head_digest,
            welcome.labels,
        )


def welcome_problems(
    name: str, spec: ClientSpec, seed: int, welcome: Welcome, reference: Reference
) -> list[str]:
    """What speaks against a site, each with both values."""
    problems = [
        f"{one.key}: {_short(one.server)} at the server, {_short(one.site)} at the site"
        for one in welcome.differences
    ]
    if welcome.client != name:
        problems.append(f"client: the site replies as {welcome.client!r}; its key belongs to {name!r}")
    for what, own, expected in (
        ("rank", welcome.rank, spec.rank),
        ("scaling", welcome.scaling, spec.scaling),
        ("seed", welcome.seed, seed),
    ):
        if own != expected:
            problems.append(f"{what}: {expected} at the server, {own} at the site")
    if name == reference.site:
        return problems
    problems += [
        text.replace(" then", f" at {reference.site}").replace(" now", f" at {name}")
        for text in base_differences(
            reference.base.model_dump(mode="json"), _base(name, welcome), welcome.sampled, same_form=False
        )[0]
    ]
    mine = Reference.of(name, welcome)
    problems += _set_difference(
        "adapted layers",
        {f"{one.name} {one.out_features}×{one.in_features}" for one in reference.layers},
        {f"{one.name} {one.out_features}×{one.in_features}" for one in mine.layers},
        reference.site,
    )
    problems += _set_difference(
        "tensors trained in full",
        {f"{key} {tuple(shape)}" for key, shape in reference.head.items()},
        {f"{key} {tuple(shape)}" for key, shape in mine.head.items()},
        reference.site,
    )
    if reference.head_digest != mine.head_digest and reference.head == mine.head:
        problems.append(
            f"initial head: {reference.head_digest[:12]}… at {reference.site}, {mine.head_digest[:12]}… at the site"
        )
    if reference.labels != mine.labels:
        problems.append(
            f"labels: {_short(reference.labels)} at {reference.site}, {_short(mine.labels)} at the site"
        )
    return problems


def base_notes(name: str, welcome: Welcome, reference: Reference) -> list[str]:
    """In which form a site has its base, where that differs from the first site's."""
    own = _base(name, welcome)
    return [
        f"{key} of the base is {getattr(own, key)}, and {getattr(reference.base, key)} at {reference.site}"
        for key in ("dtype", "quantization")
        if getattr(own, key) != getattr(reference.base, key)
    ]


def form_of_base(name: str, welcome: Welcome) -> dict[str, str]:
    """The dtype and the quantization of a site's base model.

    Raises:
        FederationError: its record of the base is not valid.
    """
    return _base(name, welcome).model_dump(include={"dtype", "quantization"})


def digest(data: bytes) -> str:
    """sha256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def _base(name: str, welcome: Welcome) -> BaseRecord:
    try:
        return BaseRecord(**welcome.base)
    except (ValidationError, TypeError):
        raise FederationError(f"{name}: its record of the base model is not valid.") from None


def _set_difference(what: str, there: set[str], here: set[str], reference: str) -> list[str]:
    if there == here:
        return []
    only_there, only_here = sorted(there - here), sorted(here - there)
    return [
        f"{what}: {len(there)} at {reference}, {len(here)} at the site; only at {reference}: "
        f"{_few(only_there)}; only at the site: {_few(only_here)}"
    ]


def _few(names: list[str]) -> str:
    return (
        ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:119] + "…"
