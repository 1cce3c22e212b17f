"""What a server is to host: adapters by name, and the one base model that all of them were trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from braidlora.config import ModelSection
from braidlora.errors import CheckpointError, ConfigError
from braidlora.inference.target import Target, find_target
from braidlora.models.fingerprint import base_fingerprint
from braidlora.models.identity import architecture, base_name
from braidlora.models.location import base_source, local_folder
from braidlora.paths import expanded
from braidlora.runs import (
    ADAPTER_WEIGHTS,
    BASE_CONFIG,
    FederatedDirectory,
    federation_around,
    read_json,
    run_around,
)
from braidlora.serving.adapter_file import (
    PLAIN,
    AdapterFile,
    Layout,
    layout_of,
    read_adapter_file,
    read_shapes,
    refusals,
)

BASE_NAME = "base"  # the base model's name at the server
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")  # that the tensors of an adapter depend on


@dataclass(frozen=True)
class Served:
    """An adapter at a server.

    Attributes:
        name: what clients ask for, as the `model` of a request.
        folder: with PEFT's files; absolute.
        config: its configuration.
        layout: experts and columns in a vLLM server; None if vLLM cannot hold it (see `Hosting.refusals`).
        target: its tasks and prompts.
    """

    name: str
    folder: Path
    config: AdapterFile
    layout: Layout | None
    target: Target


@dataclass(frozen=True)
class Hosting:
    """Everything that one server hosts.

    Attributes:
        section: the base model, as in a recipe.
        source: what to pass to transformers or vLLM for it: a folder, or a hub name.
        adapters: by name, in the order given.
    """

    section: ModelSection
    source: str
    adapters: dict[str, Served]

    @property
    def quantizations(self) -> dict[str, str]:
        """By adapter, the quantization of the base that it was trained on."""
        return {name: str(one.target.section.quantization) for name, one in self.adapters.items()}


def find(words: Sequence[str], base: str | None = None) -> Hosting:
    """Resolve the targets of `braidlora serve`.

    Args:
        words: each PATH or NAME=PATH; a federation stands for all its clients, a model without an adapter is the base
            alone.
        base: the base model, if it is not where the adapters say.

    Raises:
        ConfigError: a path or name is not usable, two targets have one name, or they have different bases.
        CheckpointError: an adapter is damaged or was trained on another base.
    """
    adapters: dict[str, Served] = {}
    sections: list[tuple[str, ModelSection]] = []
    for name, path in _expanded(words):
        target = find_target(path, base=base)
        sections.append((str(path), target.section))
        if target.origin.folder is None:
            if target.kind == "classify":
                raise ConfigError(f"{path}: a classifier without an adapter; use `braidlora predict`.")
            continue
        _check_name(name, str(path), adapters)
        adapters[name] = _served(name, target)
    section = _one_base(sections)
    hosting = Hosting(section, _absolute(base_source(section)), adapters)
    _check_base(hosting)
    return hosting


def default_name(path: Path) -> str:
    """The name of an adapter that is given without one: of its run, client or cell, or of its folder."""
    federation, run, real = federation_around(path), run_around(path), path.resolve()
    if federation is not None and real != federation.path.resolve():
        return real.parent.name if real.name == "adapter" else real.name
    if run is not None and real != run.path.resolve():
        inside = real.relative_to(run.path.resolve()).parts
        run_name = run.path.resolve().name
        return run_name if inside == ("adapter",) else f"{run_name}-{inside[-1]}"
    return real.name


def _expanded(words: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Name and path of each target, with federations as their clients."""
    for word in words:
        given, sign, rest = word.partition("=")
        named = bool(sign) and not Path(word).exists()
        path = expanded(rest if named else word)
        federation = federation_around(path)
        if federation is not None and path.resolve() == federation.path.resolve():
            for client in _clients(federation):
                yield (f"{given}-{client}" if named else client), federation.clients / client
            continue
        yield (given if named else default_name(path)), path


def _clients(federation: FederatedDirectory) -> list[str]:
    clients = sorted(federation.client_adapters())
    if not clients:
        raise CheckpointError(
            f"{federation.path}: this federation has no adapters yet; it did not finish. Resume it with `braidlora "
            "federate RECIPE --resume auto`."
        )
    return clients


def _check_name(name: str, path: str, taken: dict[str, Served]) -> None:
    how = f"Give another name: NAME={path}."
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{path}: {name!r} is not a name for a model; letters, digits, `.`, `_` and `-` are. {how}"
        )
    if name == BASE_NAME:
        raise ConfigError(f"{path}: {BASE_NAME!r} is the name of the base model. {how}")
    if name in taken:
        raise ConfigError(f"{path}: the name {name!r} is taken by {taken[name].folder}. {how}")


def _served(name: str, target: Target) -> Served:
    folder = target.origin.folder
    assert folder is not None
    config = read_adapter_file(folder)
    layout = None
    if config.peft_type == PLAIN:
        layout = Layout(1, max([config.r, *(config.rank_pattern or {}).values()]))
    elif config.ours and not refusals(config):
        layout = layout_of(config, read_shapes(folder, config.peft_type), folder / ADAPTER_WEIGHTS)
    return Served(name, folder.resolve(), config, layout, target)


def _one_base(sections: Sequence[tuple[str, ModelSection]]) -> ModelSection:
    """The base that all targets have, which may be at several places."""
    (first_path, first), *others = sections
    prints: dict[str, str | None] = {}
    for path, section in others:
        if base_source(section) == base_source(first):
            continue
        for one in (first, section):
            prints.setdefault(base_source(one), base_fingerprint(one))
        if prints[base_source(section)] is None or (
            prints[base_source(section)] != prints[base_source(first)]
        ):
            raise ConfigError(
                f"{path}: has the base {base_name(section)}, and {first_path} has {base_name(first)}; a server hosts "
                "one base. Start a server for each, or use --base PATH if both are the same model."
            )
    return first


def _check_base(hosting: Hosting) -> None:
    """Compare the base's stored weights with what each adapter recorded; a hub model is not there to compare yet."""
    cards = {name: one.target.origin.card for name, one in hosting.adapters.items()}
    recorded = {name: card.base for name, card in cards.items() if card is not None and card.base is not None}
    if not recorded:
        return
    folder, now = local_folder(hosting.section), base_fingerprint(hosting.section)
    settings = architecture(read_json(folder / BASE_CONFIG)) if folder is not None else {}
    for name, base in recorded.items():
        then = base.fingerprint
        comparable = now is not None and then.startswith("sha256:")
        changed = [
            key
            for key in _SIZES
            if settings.get(key) != base.architecture.get(key, settings.get(key)) and settings
        ]
        if (comparable and then != now) or changed:
            raise CheckpointError(
                f"{hosting.adapters[name].folder}: trained on a different base model than {base_name(hosting.section)} "
                f"({then[:19]}… then, {str(now)[:19]}… now). Name the base it was trained on with --base PATH."
            )


def _absolute(source: str) -> str:
    path = Path(source)
    return str(path.resolve()) if path.is_dir() else source
