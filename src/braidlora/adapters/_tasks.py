"""Which task the rows of a forward pass belong to, for layers whose gate is by task.

    model(**batch, tasks=ids)      model.generate(**inputs, tasks="sst2")      with for_tasks("sst2"): model(**batch)

A layer sees x alone, so the tasks reach it through a context of the current thread. A gradient checkpoint runs layers
again in backward, after the context has ended and perhaps in another thread: the functions that it runs carry the
tasks of their forward pass along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from braidlora.errors import ConfigError

# One task for all rows, by name or number; or one per row (B,), as names or numbers; or one per token (B, L).
Tasks = Tensor | Sequence[str] | str | int

_context = threading.local()


@contextmanager
def for_tasks(tasks: Tasks | None) -> Iterator[None]:
    """All forward passes in this context are of these tasks.

    Args:
        tasks: a task's name or number, for all rows; one per row, (B,); or numbers per token (B, L), of which -1 is
            padding. Numbers count from 0 in the order of the adapter's `task_names`.
    """
    before = current()
    _context.tasks = tasks
    try:
        yield
    finally:
        _context.tasks = before


def current() -> Tasks | None:
    """The tasks of this thread's context."""
    return getattr(_context, "tasks", None)


def task_numbers(names: Sequence[str], leading: Sequence[int], device: torch.device) -> Tensor | int:
    """The number of each token's task, in the context, for a layer whose tokens have the shape `leading`.

    Args:
        names: the tasks of the adapter.

    Returns:
        one number, or numbers that broadcast to `leading`.

    Raises:
        ConfigError: no tasks are given, one is unknown, or there is not one for every row.
    """
    tasks = current()
    if tasks is None:
        raise ConfigError(
            "this adapter weights its experts by task, but the forward pass was given no task: pass tasks=… to the "
            "model "
            f"(model(**batch, tasks=ids), model.generate(**inputs, tasks={names[0]!r})), or use --task. Its tasks are "
            f"{', '.join(names)}."
        )
    if isinstance(tasks, str):
        return _number(tasks, names)
    if isinstance(tasks, int):
        return _checked(torch.tensor(tasks), names).item()  # type: ignore[return-value]
    if not isinstance(tasks, Tensor):
        tasks = torch.tensor([_number(one, names) for one in tasks])
    ids = _checked(tasks, names).to(device)
    if ids.dim() == 0:
        return ids
    if ids.dim() == 2:  # packed
        if tuple(leading) != tuple(ids.shape):
            raise ConfigError(
                f"tasks has the shape {tuple(ids.shape)}, a task per token, but a layer receives tokens of the shape "
                f"{tuple(leading)}: rows and tokens cannot be distinguished there."
            )
        return ids
    rows = leading[0] if len(leading) else 1
    if len(ids) == 0 or rows % len(ids) or (len(leading) == 1 and rows != len(ids)):
        raise ConfigError(
            f"tasks has {len(ids)} rows, but a layer receives tokens of the shape {tuple(leading)}: rows cannot be "
            "distinguished there, as inside the experts of a mixture-of-experts block. Give one task for all rows, or "
            "leave such modules out of target_modules."
        )
    # Generation repeats every row for its beams.
    return ids.repeat_interleave(rows // len(ids)).view(-1, *[1] * (len(leading) - 1))


def _number(name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise ConfigError(f"the adapter was not trained on task {name!r}; its tasks are {', '.join(names)}.")
    return names.index(name)


def _checked(ids: Tensor, names: Sequence[str]) -> Tensor:
    """The ids, with 0 for padding."""
    if ids.numel() and (int(ids.max()) >= len(names) or int(ids.min()) < (-1 if ids.dim() == 2 else 0)):
        raise ConfigError(
            f"tasks has numbers from {int(ids.min())} to {int(ids.max())}; the adapter's tasks are numbered from 0 to "
            f"{len(names) - 1}: {', '.join(names)}."
        )
    return ids.clamp(min=0)


def take_tasks(model: nn.Module) -> None:
    """Make a base model take `tasks` in its call, as the context of that call."""
    if not any(hook is _begin for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_end, with_kwargs=True, always_call=True)


def _begin(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    before = current()
    _context.before = [*getattr(_context, "before", []), before]
    _context.tasks = kwargs.pop("tasks", before)
    if getattr(model, "is_gradient_checkpointing", False):
        carry_into_checkpoints(model)
    return args, kwargs


def _end(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    *_context.before, _context.tasks = _context.before


def carry_into_checkpoints(model: nn.Module) -> None:
    """Make the gradient checkpoints of a transformers model run their layers again with the tasks of their forward."""
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _Carrying):
            module.__dict__["_gradient_checkpointing_func"] = _Carrying(checkpoint)


class _Carrying:
    """A checkpoint function that gives the tasks of the present context to what it runs, now and again."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self._checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tasks = current()

        def carried(*inner: Any, **options: Any) -> Any:
            with for_tasks(tasks):
                return function(*inner, **options)

        return self._checkpoint(carried, *args, **kwargs)
