"""The handshake: server and site compare what must be equal before any round, and a site says what it has.

`hello` settles the recipe, the base model, the layers and the client; `begin` the experiment and the client's state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from braidlora.config import NOTHING, FederatedConfig, is_default, recipe_differences
from braidlora.errors import FederationError
from braidlora.federated.flower.envelope import Envelope
from braidlora.federated.protocol.clients import ClientSpec
from braidlora.federated.protocol.factors import AdaptedLayer
from braidlora.federated.protocol.failure import Failure
from braidlora.federated.simulation.resume import recipe_of_sites
from braidlora.models.identity import base_differences
from braidlora.runs import BaseRecord

HELLO, BEGIN = "hello", "begin"
# What sites are compared in, with each other.
BASE, LAYERS, HEAD, INITIAL, LABELS, COMMON = (
    "base model", "adapted layers", "tensors trained in full", "initial head", "labels", "common test",
)  # fmt: skip
_NAME = "client:"  # begins what is said of a site that answers to another name
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
    recipe = recipe_of_sites(config)
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
    """What all sites must agree on, each part as most sites have it; as the first ones by name where two are even.

    Args:
        site: one whose initial head is this one.
        base: the base model; `sampled` is the fingerprint as of braidlora 0.1.
        layers, head, head_digest, labels, common: as in `Welcome`.
        sites: by part, the sites that have it so.
        even: parts that as many other sites have in another way.
    """

    site: str
    base: BaseRecord
    sampled: str
    layers: list[AdaptedLayer]
    head: dict[str, list[int]]
    head_digest: str
    labels: dict[str, list[str]] | None
    common: dict[str, int]
    sites: Mapping[str, Sequence[str]]
    even: Collection[str] = ()

    @classmethod
    def of_most(cls, welcomes: Mapping[str, Welcome]) -> Reference:
        """From the sites' answers; raises FederationError if a record of a base is not valid."""
        bases = {name: _base(name, welcome) for name, welcome in welcomes.items()}

        def same_base(one: str, other: str) -> bool:
            return not base_differences(
                bases[one].model_dump(mode="json"), bases[other], welcomes[other].sampled, same_form=False
            )[0]

        def same(*parts: str) -> Callable[[str, str], bool]:
            return lambda one, other: all(
                getattr(welcomes[one], part) == getattr(welcomes[other], part) for part in parts
            )

        ways: dict[str, Callable[[str, str], bool]] = {
            BASE: same_base,
            LAYERS: same("layers"),
            HEAD: same("head"),
            INITIAL: same("head", "head_digest"),
            LABELS: same("labels"),
            COMMON: same("common"),
        }
        groups = {part: _groups(welcomes, way) for part, way in ways.items()}
        first = {part: welcomes[found[0][0]] for part, found in groups.items()}
        return cls(
            site=groups[INITIAL][0][0],
            base=bases[groups[BASE][0][0]],
            sampled=first[BASE].sampled,
            layers=[
                AdaptedLayer(one.name, one.out_features, one.in_features) for one in first[LAYERS].layers
            ],
            head={key: list(shape) for key, shape in first[HEAD].head.items()},
            head_digest=first[INITIAL].head_digest,
            labels=first[LABELS].labels,
            common=first[COMMON].common,
            sites={part: found[0] for part, found in groups.items()},
            even={part for part, found in groups.items() if found[1:] and len(found[0]) == len(found[1])},
        )


def _groups(names: Iterable[str], same: Callable[[str, str], bool]) -> list[list[str]]:
    """Sites that agree, the largest group first."""
    groups: list[list[str]] = []
    for name in sorted(names):
        for group in groups:
            if same(group[0], name):
                group.append(name)
                break
        else:
            groups.append([name])
    return sorted(groups, key=len, reverse=True)  # stable: of two of a size, the first by name


def welcome_problems(
    name: str, spec: ClientSpec, seed: int, welcome: Welcome, reference: Reference
) -> list[str]:
    """What speaks against a site, each with both values."""
    problems = [
        f"{one.key}: {_short(one.server)} at the server, {_short(one.site)} at the site"
        for one in welcome.differences
    ]
    if welcome.client != name:
        problems.append(f"{_NAME} the site replies as {welcome.client!r}; its key belongs to {name!r}")
    else:  # otherwise these are another client's
        problems += [
            f"{what}: {expected} at the server, {own} at the site"
            for what, own, expected in (
                ("rank", welcome.rank, spec.rank),
                ("scaling", welcome.scaling, spec.scaling),
                ("seed", welcome.seed, seed),
            )
            if own != expected
        ]
    own_base = _base(name, welcome)
    found = base_differences(
        _shown(reference.base).model_dump(mode="json"), _shown(own_base), welcome.sampled, same_form=False
    )[0]
    there = _where(reference, BASE)
    problems += [
        text.replace(" then", f" at {there}").replace(" now", f" at {name}") + _even(reference, BASE)
        for text in found
    ]
    problems += _set_difference(
        LAYERS,
        {f"{one.name} {one.out_features}×{one.in_features}" for one in reference.layers},
        {f"{one.name} {one.out_features}×{one.in_features}" for one in welcome.layers},
        reference,
    )
    problems += _set_difference(
        HEAD,
        {f"{key} {tuple(shape)}" for key, shape in reference.head.items()},
        {f"{key} {tuple(shape)}" for key, shape in welcome.head.items()},
        reference,
    )
    if reference.head_digest != welcome.head_digest and reference.head == welcome.head:
        problems.append(
            f"{INITIAL}: {reference.head_digest[:12]}… at {_where(reference, INITIAL)}, {welcome.head_digest[:12]}… at "
            f"the site{_even(reference, INITIAL)}"
        )
    if reference.labels != welcome.labels:
        problems.append(
            f"{LABELS}: {_short(reference.labels)} at {_where(reference, LABELS)}, {_short(welcome.labels)} at the "
            f"site{_even(reference, LABELS)}"
        )
    if reference.common != welcome.common:
        problems.append(
            f"{COMMON}: {_rows(reference.common)} at {_where(reference, COMMON)}, {_rows(welcome.common)} at the "
            f"site{_even(reference, COMMON)}"
        )
    return problems


def advice(problems: Mapping[str, Sequence[str]]) -> str:
    """What to do about the problems of `welcome_problems`, by site."""
    swapped = [name for name, found in problems.items() if any(text.startswith(_NAME) for text in found)]
    others = any(not text.startswith(_NAME) for found in problems.values() for text in found)
    parts = []
    if swapped:
        parts.append(
            f"Check `name` in site.yaml at {', '.join(sorted(swapped))}, and under which name `site add` registered "
            "which node.pub (`sites` in server.yaml)."
        )
    if others:
        parts.append("Give all sites the same recipe and base model.")
    return " ".join([*parts, "Then start again."])


def check_base(name: str, welcome: Welcome) -> None:
    """Raise FederationError if a site's record of its base is not valid."""
    _base(name, welcome)


def without_folder(path: str) -> str:
    """The path of a base without the folders that it is in; names such as `org/model` as they are."""
    if path.startswith(("/", "~", ".", "\\")) or PureWindowsPath(path).drive:
        return PureWindowsPath(path).name or path  # splits at both kinds of slash
    return path


def base_notes(name: str, welcome: Welcome, reference: Reference) -> list[str]:
    """In which form a site has its base, where that differs from the first of most sites."""
    own = _base(name, welcome)
    first = reference.sites[BASE][0]
    return [
        f"{key} of the base is {getattr(own, key)}, and {getattr(reference.base, key)} at {first}"
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


def _shown(base: BaseRecord) -> BaseRecord:
    return base.model_copy(update={"path": without_folder(base.path)})


def _where(reference: Reference, part: str) -> str:
    return _few(list(reference.sites[part]))


def _even(reference: Reference, part: str) -> str:
    return " (neither has more sites)" if part in reference.even else ""


def _rows(common: Mapping[str, int]) -> str:
    return _short(", ".join(f"{count} rows of {task}" for task, count in common.items()) or "none")


def _set_difference(what: str, there: set[str], here: set[str], reference: Reference) -> list[str]:
    if there == here:
        return []
    only_there, only_here = sorted(there - here), sorted(here - there)
    where = _where(reference, what)
    return [
        f"{what}: {len(there)} at {where}, {len(here)} at the site; only at {where}: "
        f"{_few(only_there)}; only at the site: {_few(only_here)}{_even(reference, what)}"
    ]


def _few(names: list[str]) -> str:
    return (
        ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:119] + "…"
