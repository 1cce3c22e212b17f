"""Mixed-adapter batches: each row of an inference batch uses the adapter that `adapter_names` names for it.

    model(**inputs, adapter_names=["fr", "de", "__base__"])       model.generate(..., adapter_names=...)

As with PEFT's LoRA: one name per row, `__base__` for the base model, in eval mode, nothing merged. The names reach the
layers as a keyword argument that hooks add for one call; a layer then adds to every row what that row's adapter alone
would have added.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from braidlora.adapters._fusion import can_fuse
from braidlora.adapters._peft_compat import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

BASE = "__base__"
# Modules that see some of the batch's tokens, in their own order; experts that all tokens share see all.
_ROUTED = re.compile(r"(^|_)experts?(_|$)")
_FLATTENED = (
    " A 2-D input may be a batch whose rows and tokens were flattened, as in a mixture-of-experts block, where rows "
    "cannot be distinguished; run one adapter at a time there, with set_adapter."
)
_REPEATED = (
    " In generation, pass num_beams and num_return_sequences as arguments, so that the names can be repeated like the "
    "rows."
)


class RowNames(Sequence[str]):
    """One adapter name per row, and how often generation repeats each row (beams, returned sequences).

    With `base_only`, any number of rows uses the base model.
    """

    def __init__(self, names: Sequence[str], copies: int = 1, base_only: bool = False) -> None:
        self.names, self.copies, self.base_only = list(names), copies, base_only

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        return self.names[index]

    def for_rows(self, rows: int, hint: str = "") -> list[str]:
        """The names for `rows` rows: as given, or each repeated; raises ValueError, with `hint`, if neither fits."""
        if self.base_only:
            return [BASE] * rows
        # An encoder sees each row once, the decoder `copies` times in succession.
        if rows == len(self.names):
            return self.names
        if rows == len(self.names) * self.copies:
            return [name for name in self.names for _ in range(self.copies)]
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(self)} and {rows} "
            f"respectively.{hint}"
        )


def mixed_batch_forward(layer: Any, x: Tensor, names: Sequence[str], args: Any, kwargs: Any) -> Tensor:
    """(B, …, k) → (B, …, d): the base layer's result, plus, on every row, the update of the adapter named for it.

    Args:
        layer: an `AdapterLayer`. Rows of an adapter that it does not have get the base layer's result.
        names: B names.

    Raises:
        ValueError: the names do not fit the rows, or adapters are merged.
    """
    row_names = _names_of_rows(layer, x, names)
    y = layer.base_layer(x, *args, **kwargs)
    if layer.disable_adapters:
        return y
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(row_names):
        if layer.has_adapter(name):
            rows.setdefault(name, []).append(row)
    if not rows:
        return y
    update = layer._delta
    if not (layer.training or torch.is_grad_enabled()) and can_fuse(x):
        update = layer.update_without_gradients
    if len(rows) == 1 and len(next(iter(rows.values()))) == len(x):
        return y + update(x, next(iter(rows))).to(y.dtype)
    picked = {name: torch.tensor(indices, device=x.device) for name, indices in rows.items()}
    deltas = [update(x.index_select(0, index), name).to(y.dtype) for name, index in picked.items()]
    # Out of place: the base layer's result may be held by others.
    return y.index_add(0, torch.cat(list(picked.values())), torch.cat(deltas))


def _names_of_rows(layer: Any, x: Tensor, names: Sequence[str]) -> list[str]:
    given = names if isinstance(names, RowNames) else RowNames(names)
    row_names = given.for_rows(len(x), _FLATTENED if x.dim() == 2 else _REPEATED)
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    return row_names


class MixedBatchTuner:
    """Lets `PeftModel.forward` and `.generate` take `adapter_names`."""

    if TYPE_CHECKING:
        model: nn.Module
        training: bool
        peft_config: dict[str, Any]
        tuner_layer_cls: type[Any]

        def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("alora_offsets") is not None:
            raise ValueError("alora_offsets belong to Activated LoRA (PEFT's LoraConfig); leave them out")
        if kwargs.get("adapter_names") is None:
            yield
            return
        names = RowNames(self._checked_names(kwargs["adapter_names"]), _copies(kwargs))
        handles = []
        activated: list[tuple[Any, Any]] = []
        try:
            for path, module in self.named_modules():
                if isinstance(module, self.tuner_layer_cls):
                    # No adapter of the batch is in a routed expert (_checked_names), whose rows are not the batch's.
                    given = RowNames([], base_only=True) if _is_routed(path) else names
                    hook = functools.partial(_name_rows, given)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                elif isinstance(module, AuxiliaryTrainingWrapper):
                    activated.append((module, module._active_adapter))
                    hook = functools.partial(_switch, names)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for wrapper, active in activated:
                wrapper._active_adapter = active

    def _checked_names(self, names: Any) -> list[str]:
        """The names as a list. Raises ValueError or TypeError if they cannot be used."""
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode; call model.eval() first."
            )
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"adapter_names is {names!r}; it must be a list with one adapter name for every row of the batch"
            )
        known = set(self.peft_config)
        unknown = sorted(set(names) - known - {BASE})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
                f"Known: {', '.join(sorted(known))}, and {BASE} for the base model."
            )
        for path, module in self.named_modules():
            if not isinstance(module, self.tuner_layer_cls) or not _is_routed(path):
                continue
            if concerned := sorted(set(names) & module._get_available_adapters()):
                raise ValueError(
                    f"Cannot pass `adapter_names`: {', '.join(concerned)} adapt {path!r}, an expert of a mixture of "
                    "experts. It sees some of the batch's tokens in its own order, so rows cannot be distinguished. "
                    "Run one adapter at a time, with set_adapter, or leave experts out of target_modules."
                )
        others = set(names)
        for name in sorted(others - {BASE}):
            if self.peft_config[name].bias != "none" and others != {name}:
                warnings.warn(
                    f"adapter {name!r} trains biases of the base model (bias={self.peft_config[name].bias!r}): rows of "
                    f"{', '.join(sorted(others - {name}))} use them too",
                    stacklevel=6,
                )
        return list(names)


def _name_rows(names: RowNames, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Add the names to the call of an adapter layer."""
    return args, {**kwargs, "adapter_names": names}


def _switch(names: RowNames, wrapper: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Add the names to the call of a module that is trained in full, or of an embedding with trained tokens.

    PEFT's wrappers send all rows to the base module unless the *active* adapter is one of theirs, and reject rows of
    adapters that they do not have. So one of theirs is activated for the call, and other rows go to the base.
    """
    row_names = names.for_rows(len(args[0]) if args else len(names))
    own = [name if name in wrapper._adapters else BASE for name in row_names]
    theirs = sorted(set(own) - {BASE})
    wrapper._active_adapter = theirs[:1]
    if isinstance(wrapper, ModulesToSaveWrapper) and len(set(own)) == 1:
        return args, kwargs  # one module for all rows, which may be of any class
    return args, {**kwargs, "adapter_names": own}


def _is_routed(path: str) -> bool:
    return any(_ROUTED.search(part) and "shared" not in part for part in path.split("."))


def _copies(kwargs: dict[str, Any]) -> int:
    """How often generation repeats every row."""
    config = kwargs.get("generation_config")
    counts = [kwargs.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences")]
    return max([1, *(count for count in counts if isinstance(count, int))])
