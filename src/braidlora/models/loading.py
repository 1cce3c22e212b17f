"""Loading a model to use it: a run directory, an adapter folder, or a base model, with its recipe and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from braidlora.config import RunConfig
from braidlora.errors import CheckpointError, ConfigError
from braidlora.models.adapter_reader import load_adapter, open_adapter
from braidlora.models.base import check_cutoff, load_base
from braidlora.models.gguf import SUFFIX as GGUF
from braidlora.models.origin import Origin, recipe_of
from braidlora.models.presence import refuse_missing_base
from braidlora.paths import expanded
from braidlora.runs import (
    ADAPTER_CONFIG,
    BASE_CONFIG,
    CELLS,
    RECIPE,
    FederatedDirectory,
    RunDirectory,
    comparison_cells,
    holder_of,
    restore_replaced,
    run_around,
)
from braidlora.tasks import LabelSpace, Task, load_tasks

_LISTED = 12


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, and what its evaluation needs."""

    model: Any
    tokenizer: Any
    config: RunConfig
    tasks: list[Task]
    label_space: LabelSpace | None


@dataclass(frozen=True)
class Found:
    """What a path or name refers to, before anything large is loaded.

    Attributes:
        config: the recipe that goes with it.
        run: the run that it is, or belongs to.
        is_run: whether it is the run itself.
        adapter: the adapter's folder; None for a base model.
        own_recipe: whether the recipe is the run's own, without overrides.
    """

    config: RunConfig
    run: RunDirectory | None
    is_run: bool
    adapter: Path | None
    own_recipe: bool

    def load(self) -> Loaded:
        """Model, tokenizer and tasks; raises as `load_for_evaluation`."""
        config, tasks = self.config, load_tasks(self.config)
        if self.adapter is not None and self.own_recipe:
            refuse_missing_base(self.adapter, config.model.path, "--model.path=PATH")
        origin = Origin.of(self.adapter, self.run)
        label_space = origin.label_space(config, tasks)
        if self.adapter is not None:
            open_adapter(self.adapter)  # what is wrong with it shows before a large base is loaded
        torch.manual_seed(config.seed)  # a base classifier's head is new
        recorded = origin.card.prompt if origin.card is not None and self.own_recipe else None
        section = config.model
        if recorded is not None and recorded.chat_template is not None:
            section = section.model_copy(
                update={"chat_template": None}
            )  # its file may have changed, or be gone
        model, tokenizer = load_base(section, label_space)
        if recorded is not None and recorded.chat_template is not None:
            tokenizer.chat_template = recorded.chat_template
        check_cutoff(model, config)
        if self.adapter is not None:
            origin.check_base(model, config.model)
            model = load_adapter(model, self.adapter)
        if torch.cuda.is_available() and config.model.quantization == "none":
            model.to("cuda")
        return Loaded(model.eval(), tokenizer, config, tasks, label_space)


def load_for_evaluation(
    target: str | Path, config: RunConfig | None = None, overrides: Sequence[str] = ()
) -> Loaded:
    """Load model, tokenizer and tasks of a run directory, an adapter folder or a base model.

    An adapter inside a run (`adapter`, `adapter_init`, `checkpoints/step-N`) takes the run's recipe; any other adapter
    and a base model need `config`. The model goes to the GPU if there is one.

    Args:
        target: path, hub name of a base model, or `embedded`.
        config: the recipe to use instead of the target's own.
        overrides: `dotted.key=value` for the target's own recipe; ignored with `config`.

    Raises:
        ConfigError: a recipe is missing, or the target is none of the three.
        CheckpointError: the adapter is missing, damaged, pickled, or made for another base.
    """
    return find(target, config, overrides).load()


def find(target: str | Path, config: RunConfig | None = None, overrides: Sequence[str] = ()) -> Found:
    """What `target` is and which recipe goes with it; arguments and errors as of `load_for_evaluation`."""
    folder = expanded(target)
    run = run_around(folder)
    adapter = adapter_folder(folder, run)
    own_recipe = config is None and not overrides
    if config is None:
        if run is None:
            there = (
                "has no recipe of its own"
                if folder.is_dir() or target == "embedded"
                else "no such folder, and no recipe"
            )
            raise ConfigError(
                f"{target}: {there}; give the tasks and prompts to evaluate on with --recipe RECIPE."
            )
        config = recipe_of(run, overrides)
    if adapter is None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(target)})})
    is_run = run is not None and run.path == folder.resolve()
    return Found(config, run, is_run, adapter, own_recipe)


def adapter_folder(folder: Path, run: RunDirectory | None) -> Path | None:
    """The folder with the adapter, or None where `folder` is a base model."""
    if run is not None and run.path == folder.resolve():
        if holder_of(run.path) is None:
            restore_replaced(run.adapter)  # a kill may have left it set aside
        if not run.adapter.is_dir():
            federation = FederatedDirectory.at(run.path)
            if federation.state() != "foreign":
                return client_folder(folder, federation)
            raise CheckpointError(
                f"{folder}: this run has no adapter yet; it did not finish. Resume it with `braidlora train RECIPE "
                "--resume auto`, or evaluate one of its checkpoints: checkpoints/step-N."
            )
        return run.adapter
    if not folder.is_dir():
        return None
    refuse_comparison(folder)
    names = {path.name for path in folder.iterdir()}
    if ADAPTER_CONFIG in names or any(name.startswith("adapter_model") for name in names):
        return folder
    if BASE_CONFIG in names or any(name.endswith(GGUF) for name in names):
        return None
    raise ConfigError(
        f"{folder}: contains no run ({RECIPE}), no adapter ({ADAPTER_CONFIG}) and no base model ({BASE_CONFIG})."
    )


def refuse_comparison(folder: Path) -> None:
    """Raise ConfigError, with the names of its runs, if `folder` is a comparison."""
    cells = comparison_cells(folder)
    if cells is not None:
        names = ", ".join(cells[:_LISTED]) + (", …" if cells[_LISTED:] else "")
        raise ConfigError(
            f"{folder}: a comparison; give one of its runs: {folder}/{CELLS}/NAME, where NAME is one of "
            f"{names or 'none, because no run has started'}. `braidlora export {folder} --best` takes the one that "
            "its verdict recommends."
        )


def client_folder(path: Path, federation: FederatedDirectory) -> Path:
    """The adapter folder of the client that `path` is, as clients/NAME or clients/NAME/adapter of a federation.

    Raises:
        ConfigError: it is the federation itself; the message names its clients.
        CheckpointError: the federation has no adapters yet.
    """
    clients = sorted(federation.client_adapters())
    named = path.resolve()
    named = named.parent if named.name == "adapter" else named
    if named.parent == federation.clients and (named / "adapter").is_dir():
        return named / "adapter"
    if not clients:
        raise CheckpointError(
            f"{path}: this federation has no adapters yet; it did not finish. Resume it with `braidlora federate "
            "RECIPE --resume auto`."
        )
    names = ", ".join(clients[:_LISTED]) + (", …" if clients[_LISTED:] else "")
    raise ConfigError(
        f"{path}: a federation; each client has its own model. Give one of them: {federation.clients}/NAME, where "
        f"NAME is one of {names}."
    )
