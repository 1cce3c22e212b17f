"""LoRA-FA's optimizer rejects our adapters when it is created.

`peft.optimizers.create_lorafa_optimizer` takes all parameters with "lora" in their names, in pairs, as an A and its B.
Of ours it would pair A with the router, or A with M, and project gradients with the wrong matrix.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from braidlora.adapters._registration import FACTORED_PREFIX, PREFIX
from braidlora.errors import ConfigError

MODULE = "peft.optimizers.lorafa"
# The last factor, trainable exactly when its adapter is, for each of ours.
_LAST = {f".{PREFIX}A.": f".{PREFIX}B.", f".{FACTORED_PREFIX}A.": f".{FACTORED_PREFIX}B2."}


def guard(module: ModuleType) -> None:
    """Wrap the optimizer's constructor, once `peft.optimizers.lorafa` has been imported."""
    # The class, not the function, which others may have imported by name already.
    wrapt.wrap_function_wrapper(module, "LoraFAOptimizer.__init__", _refuse_ours)


def _refuse_ours(initialize: Any, _instance: Any, args: Any, kwargs: Any) -> None:
    groups = list(args[0] if args else kwargs["params"])  # it may be an iterator
    args, kwargs = (groups, *args[1:]), {k: v for k, v in kwargs.items() if k != "params"}
    named = {
        name: parameter
        for group in groups
        if isinstance(group, dict) and "names" in group
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    ours = [name for name in named if f".{PREFIX}" in name or f".{FACTORED_PREFIX}" in name]
    if not ours:
        initialize(*args, **kwargs)
        return
    # create_lorafa_optimizer has frozen every A by now.
    for name in ours:
        for first, last in _LAST.items():
            if first in name:
                named[name].requires_grad_(named[name.replace(first, last)].requires_grad)
    raise ConfigError(
        f"LoRA-FA's optimizer does not work with braidlora's adapters ({ours[0]}, …): it expects one A and one B per "
        "layer and would pair an A with a router or another factor. Use torch.optim.AdamW or "
        "peft.optimizers.create_loraplus_optimizer; to train with A frozen, call requires_grad_(False) on the "
        f"parameters named {PREFIX}A and use AdamW"
    )
