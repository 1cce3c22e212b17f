"""What `braidlora evaluate` is pointed at: a run directory, an adapter folder, or a base model."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from braidlora.adapters.base_edits import base_edit, why_refused
from braidlora.config import RunConfig, dump_config, load_config
from braidlora.errors import CheckpointError, ConfigError, TrainingError, is_out_of_memory
from braidlora.json_text import loads
from braidlora.models.origin import Origin
from braidlora.paths import expanded
from braidlora.runs import (
    MANIFEST,
    Committed,
    FederatedDirectory,
    RunDirectory,
    covered,
    holder_of,
    read_covered,
    restore_replaced,
)
from braidlora.tasks import LabelSpace, Task, load_tasks

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_LISTED = 6  # how many keys a message names


@dataclass(frozen=True)
class Loaded:
    """A model with all that its evaluation needs; `directory` is where its results go by default."""

    model: Any
    tokenizer: Any
    config: RunConfig
    tasks: list[Task]
    label_space: LabelSpace | None
    directory: Path
    kept_metrics: dict[str, Any] = field(default_factory=dict)
    """Entries of a run's `metrics.json` that evaluating it again does not change: seconds, trainable_parameters."""


def load_for_evaluation(
    target: str | Path, config: RunConfig | None = None, overrides: Sequence[str] = ()
) -> Loaded:
    """Load model, tokenizer and tasks of a run directory, an adapter folder or a base model.

    An adapter inside a run (`adapter`, `adapter_init`, `checkpoints/step-N`) takes the run's recipe; any other adapter
    and a base model need `config`. The model goes to the GPU where there is one.

    Args:
        target: path, hub name of a base model, or `embedded`.
        config: the recipe to use instead of the target's own.
        overrides: `dotted.key=value` for the target's own recipe; `config` has its own already.

    Raises:
        ConfigError: no recipe is at hand, or the target is none of the three.
        CheckpointError: the adapter is missing, damaged, pickled, or made for another base.
    """
    return find(target, config, overrides).load()


@dataclass(frozen=True)
class Found:
    """What a target is, before anything large is loaded; `directory` is where its results go by default."""

    config: RunConfig
    run: RunDirectory | None
    adapter: Path | None
    directory: Path

    def _training_record(self) -> dict[str, Any]:
        """What training put into a run's `metrics.json`, which a new evaluation of the run keeps."""
        if self.run is None or self.directory != self.run.path:
            return {}
        metrics = self.run.metrics
        if metrics.is_file():
            before = self.run.read_json(metrics.name)
            return {key: before[key] for key in ("seconds", "trainable_parameters") if key in before}
        if metrics.name in (covered(self.run.path) or {}):
            raise CheckpointError(
                f"{metrics}: missing, though the manifest lists it; it also holds what training recorded. `braidlora "
                f"train RECIPE --output={self.run.path} --resume auto` makes it again. --directory=PATH evaluates "
                "without it."
            )
        return {}

    def load(self) -> Loaded:
        """Model, tokenizer and tasks; raises as `load_for_evaluation`."""
        kept = self._training_record()
        tasks = load_tasks(self.config)
        origin = Origin.of(self.adapter, self.run)
        label_space = origin.label_space(self.config, tasks)
        model, tokenizer = _load_model(self.config, label_space, origin)
        return Loaded(model, tokenizer, self.config, tasks, label_space, self.directory, kept)


def find(target: str | Path, config: RunConfig | None = None, overrides: Sequence[str] = ()) -> Found:
    """What `target` is and which recipe goes with it; arguments and errors as of `load_for_evaluation`."""
    folder = expanded(target)
    run = run_around(folder)
    adapter = adapter_folder(folder, run)
    changed = config is not None or bool(overrides)
    if config is None:
        if run is None:
            there = (
                "brings no recipe"
                if folder.is_dir() or target == "embedded"
                else "no such folder, and no recipe"
            )
            raise ConfigError(
                f"{target}: {there}; name the tasks and prompts to evaluate on with --recipe RECIPE."
            )
        config = load_config(run.config, overrides, content=run.read(run.config.name))
    if adapter is None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(target)})})
    return Found(config, run, adapter, _results(folder, config, run, adapter, changed))


def open_adapter(folder: Path) -> Committed:
    """The files of an adapter folder, each of which is checked when it is read.

    An adapter that PEFT alone has saved has no manifest, and is read as it is. Inside a run or a federation every
    adapter has one.

    Raises:
        CheckpointError: the folder is no adapter, is pickled, stands in a run without its manifest, or is not the one
            that the run was finished with.
    """
    refuse_what_is_no_adapter(folder)
    real, run = folder.resolve(), run_around(folder)
    home = run.path.resolve() if run is not None else None
    if home is None and real.parent.parent.name == "clients":
        federation = FederatedDirectory(real.parent.parent.parent)
        home = federation.path if federation.experiment.is_file() else None
    found = Committed(folder, needs_manifest=home is not None)
    if home is not None:
        name = (real / MANIFEST).relative_to(home).as_posix()
        if name in (covered(home) or {}):  # it is the very adapter that the run ended with
            read_covered(home, name)
    return found


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """`PeftModel.from_pretrained`, strictly: every tensor is there, has its shape, is used, and is finite.

    PEFT itself goes on with a warning when keys are missing, and silently when there are too many. It reads a private
    copy, which is checked against the folder's manifest while it is made.

    Raises:
        CheckpointError: the folder is no adapter, is damaged or pickled, or does not fit the base; the message lists
            missing and unexpected keys and those of another shape.
    """
    import peft

    try:
        with open_adapter(folder).copy((ADAPTER_CONFIG, ADAPTER_WEIGHTS)) as copy, warnings.catch_warnings():
            found = read_shapes(copy / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
            warnings.simplefilter("ignore")  # PEFT's warnings of misfits, which are errors below
            model = peft.PeftModel.from_pretrained(
                base,
                str(copy),
                is_trainable=False,
                ignore_mismatched_sizes=True,
                torch_device=str(base.device),
            )
    except (CheckpointError, TrainingError):
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise
        name = base.config.name_or_path or type(base).__name__
        raise CheckpointError(f"{folder}: PEFT cannot put this adapter onto {name}: {error}") from error
    expected = {
        key: tuple(value.shape)
        for key, value in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    _refuse_misfits(folder, found, expected, _embedding_names(model))
    return model


def run_around(folder: Path) -> RunDirectory | None:
    """The run that `folder` is, or that it stands in as an adapter or a checkpoint."""
    if not folder.is_dir():
        return None
    real = folder.resolve()
    for candidate in (real, real.parent, real.parent.parent):
        run = RunDirectory(candidate)
        inside = real in (candidate, run.adapter, run.adapter_init) or real.parent == run.checkpoints
        if inside and run.config.is_file() and run.environment.is_file():
            return RunDirectory.at(candidate)
    return None


def adapter_folder(folder: Path, run: RunDirectory | None) -> Path | None:
    """The folder with the adapter, or None where `folder` is a base model."""
    if run is not None and run.path == folder.resolve():
        if holder_of(run.path) is None:
            restore_replaced(run.adapter)  # a kill may have left it set aside
        if not run.adapter.is_dir():
            raise CheckpointError(
                f"{folder}: this run has no adapter yet; it did not finish. Carry on with `braidlora train RECIPE "
                "--resume auto`, or evaluate one of its checkpoints: checkpoints/step-N."
            )
        return run.adapter
    if not folder.is_dir():
        return None
    names = {path.name for path in folder.iterdir()}
    if ADAPTER_CONFIG in names or any(name.startswith("adapter_model") for name in names):
        return folder
    if "config.json" in names:
        return None
    raise ConfigError(
        f"{folder}: holds no run (config.yaml), no adapter ({ADAPTER_CONFIG}) and no base model (config.json)."
    )


def _load_model(config: RunConfig, label_space: LabelSpace | None, origin: Origin) -> tuple[Any, Any]:
    from braidlora.models.base import check_cutoff, load_base

    adapter = origin.folder
    if adapter is not None:
        refuse_what_is_no_adapter(adapter)  # before minutes go into a large base
    torch.manual_seed(config.seed)  # a base classifier's head is new
    model, tokenizer = load_base(config.model, config.kind, label_space)
    check_cutoff(model, config)
    if adapter is not None:
        origin.check_base(model, config.model)
        model = load_adapter(model, adapter)
    if torch.cuda.is_available() and config.model.quantization == "none":
        model.to("cuda")
    return model.eval(), tokenizer


def _results(
    folder: Path, config: RunConfig, run: RunDirectory | None, adapter: Path | None, changed: bool
) -> Path:
    """Where the results go by default."""
    digest = hashlib.sha256(dump_config(config).encode()).hexdigest()[:8]
    if adapter is None:
        return RunDirectory.at(f"{config.output}-base").path
    if run is None or run.path != folder.resolve():
        return adapter / "evaluation"
    return run.path / "evaluations" / digest if changed else run.path


def refuse_what_is_no_adapter(folder: Path) -> None:
    """Refuse a folder that holds no adapter for the stored base.

    Raises:
        CheckpointError: PEFT's two files (a configuration, and weights as safetensors) are not both there, or the
            adapter belongs to an edited base (see `adapters.base_edits`).
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                f"{folder}: has its weights as a pickle ({pickles[0]}), which can run code when it is read. Only "
                f"{ADAPTER_WEIGHTS} is read: load it where you trust it and call save_pretrained() again."
            )
        raise CheckpointError(f"{folder}: {ADAPTER_WEIGHTS} is missing; the adapter is incomplete.")
    try:
        config = loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {ADAPTER_CONFIG} is missing; the adapter is incomplete.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: not readable as JSON ({error}); damaged."
        ) from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: names no `peft_type`; it is no adapter configuration of PEFT."
        )
    if not known_kind(config["peft_type"]):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: peft_type is {config['peft_type']!r}, which the installed PEFT does not know. "
            "Is the file damaged, or does the adapter need a newer PEFT?"
        )
    if setting := base_edit(config):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {why_refused(setting)}.")


def known_kind(peft_type: Any) -> bool:
    """Whether PEFT, with what this package adds to it, has adapters of this type."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return isinstance(peft_type, str) and peft_type in PEFT_TYPE_TO_CONFIG_MAPPING


def read_shapes(path: Path, called: Path | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a safetensors file; all values are checked to be finite.

    `called` is the path that messages name, where `path` is a copy.
    """
    from safetensors import SafetensorError, safe_open

    shapes, called = {}, called or path
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise CheckpointError(f"{called}: {key} holds NaN or infinity; use an older checkpoint.")
                shapes[key] = tuple(tensor.shape)
    except SafetensorError as error:
        raise CheckpointError(f"{called}: damaged or cut short ({error}).") from None
    return shapes


def _embedding_names(model: Any) -> set[str]:
    # PEFT may save resized embeddings beside the adapter.
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [layer.weight for layer in layers if layer is not None and hasattr(layer, "weight")]
    return {name for name, value in model.named_parameters() if any(value is weight for weight in weights)}


def _refuse_misfits(
    folder: Path,
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    optional: set[str],
) -> None:
    problems = []
    if missing := [key for key in expected if key not in found]:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if unexpected := [key for key in found if key not in expected and key not in optional]:
        problems.append(f"{len(unexpected)} unexpected: {_some(unexpected)}")
    wrong = [
        f"{key} is {found[key]}, expected {expected[key]}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {_some(wrong)}")
    if problems:
        raise CheckpointError(
            f"{folder}: the adapter does not fit this base and its own {ADAPTER_CONFIG}. Of {len(expected)} tensors "
            + "; ".join(problems)
            + ". Use the base (and the adapter_config.json) that it was trained with."
        )


def _some(items: Iterable[str]) -> str:
    items = sorted(items)
    return ", ".join(items[:_LISTED]) + (f", … ({len(items) - _LISTED} more)" if len(items) > _LISTED else "")
