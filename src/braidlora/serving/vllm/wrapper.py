"""The gate inside vLLM: between its shrink and expand kernels, on any platform.

vLLM's "punica wrapper" runs the LoRA kernels of one platform. All paths, sharded ones too, pass its `add_expand` with
the shrunk input in float32, which is where the gate belongs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from braidlora.serving.gate import GateTables

_PARTIAL = "braidlora_partial"  # keyword: the buffer is this worker's part of a sum


@functools.cache
def with_gate(wrapper_class: type) -> type:
    """A subclass of a platform's punica wrapper that applies the gate."""

    class Gated(wrapper_class):
        gate: GateTables
        on_cpu: bool
        is_needed = True

        def update_metadata(
            self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **kwargs: Any
        ) -> None:
            super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
            self.gate.set_batch(self.token_lora_indices)
            if self.on_cpu:  # never captured in a graph, so a batch of plain LoRAs may skip the gate
                slots = {name: slot for slot, name in enumerate(lora_index_to_id) if name is not None}
                used = set(mapping.index_mapping)
                # The CPU kernels take the index -1 of the base for the last slot; the factor 0 corrects that.
                self.is_needed = 0 in used or any(slots.get(name) in self.gate.routed for name in used)

        def add_expand(
            self,
            y: Any,
            x: Any,
            lora_b_stacked: Any,
            output_slices: Any,
            offset_start: int = 0,
            add_inputs: bool = True,
            **kwargs: Any,
        ) -> Any:
            partial = kwargs.pop(_PARTIAL, False)
            if self.is_needed:
                buffer = x if isinstance(x, torch.Tensor) else torch.stack(tuple(x))
                x = self.gate.apply(buffer, _all_reduce if partial else None)
            return super().add_expand(y, x, lora_b_stacked, output_slices, offset_start, add_inputs, **kwargs)

        def add_shrink(self, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop(_PARTIAL, None)
            return super().add_shrink(*args, **kwargs)

        def add_lora_logits(
            self, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, **kwargs: Any
        ) -> Any:
            """For `prompt_logprobs` vLLM passes one prompt's tokens, but has indices for one token per request.

            Its CPU kernels fail on that and end the engine as soon as two requests ask at once. Where no adapter has
            weights for the output layer, there is nothing to add.
            """
            rows = x.numel() // x.shape[-1]
            if self.on_cpu and rows != self.sampler_indices.numel() and not lora_b_stacked.any():
                return None
            return super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs)

    Gated.__name__ = Gated.__qualname__ = f"Gated{wrapper_class.__name__}"
    return Gated


class Partial:
    """A wrapper as seen by a row-parallel layer with tensor parallelism: each worker has a part of the sum.

    The hidden columns may stay partial, since they are summed after the expand. The router's logits may not.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def add_lora_linear(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper.add_lora_linear(*args, **kwargs, **{_PARTIAL: True})


def _all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    from vllm.distributed import tensor_model_parallel_all_reduce

    reduced: torch.Tensor = tensor_model_parallel_all_reduce(tensor)
    return reduced


def install() -> None:
    """Make vLLM use gated wrappers, and tell them what each slot holds."""
    from vllm.lora import model_manager
    from vllm.lora.layers import RowParallelLinearWithLoRA, RowParallelLinearWithShardedLoRA

    from braidlora.serving.vllm.seams import replaced

    make_wrapper = model_manager.get_punica_wrapper
    activate = model_manager.LoRAModelManager.activate_adapter
    set_mapping = RowParallelLinearWithLoRA.set_mapping

    def get_punica_wrapper(*args: Any, **kwargs: Any) -> Any:
        wrapper = make_wrapper(*args, **kwargs)
        platform: Any = type(wrapper)
        wrapper.__class__ = with_gate(platform)
        config = kwargs["lora_config"]
        tokens = args[0] if args else kwargs["max_num_batched_tokens"]
        wrapper.gate = GateTables(config.max_loras, config.max_lora_rank, tokens, wrapper.device)
        wrapper.on_cpu = torch.device(wrapper.device).type == "cpu"
        return wrapper

    def activate_adapter(self: Any, lora_id: int) -> bool:
        activated: bool = activate(self, lora_id)
        if activated:
            slot = self.lora_index_to_id.index(lora_id)
            layout = getattr(self._registered_adapters[lora_id], "braidlora", None)
            for wrapper in self.punica_wrapper_mapping.values():
                wrapper.gate.set_slot(slot, layout)
        return activated

    def set_mapping_partial(self: Any, punica_wrapper: Any) -> None:
        # The sharded layer sums the whole buffer itself before it expands.
        partial = self.tp_size > 1 and not isinstance(self, RowParallelLinearWithShardedLoRA)
        set_mapping(self, Partial(punica_wrapper) if partial else punica_wrapper)

    model_manager.get_punica_wrapper = replaced(make_wrapper, get_punica_wrapper)
    model_manager.LoRAModelManager.activate_adapter = replaced(activate, activate_adapter)
    RowParallelLinearWithLoRA.set_mapping = replaced(set_mapping, set_mapping_partial)
