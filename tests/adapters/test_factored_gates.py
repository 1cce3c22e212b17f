"""What the factored layer may cost, counted rather than timed, and merges that fail half-way."""

import pytest
import torch
from accounting import ALLOCATIONS, Unnoticed
from peft import get_peft_model
from torch import nn

from braidlora import FactoredLoraConfig
from braidlora.errors import MergeError

TOKENS, K, D = 32, 53, 47


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(K, D)


class Operations(Unnoticed):
    """The largest result that any operation writes, and how many read a tensor; views and allocations do neither."""

    def __init__(self, watched):
        super().__init__()
        self._storage, self.reads, self.largest = watched.untyped_storage().data_ptr(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.__name__.split(".")[0] in ("detach", *ALLOCATIONS):
            return result
        for tensor in (a for a in args if isinstance(a, torch.Tensor)):
            self.reads += tensor.untyped_storage().data_ptr() == self._storage
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def adapted(plain=False, **settings):
    torch.manual_seed(0)
    config = FactoredLoraConfig(
        r=3, r_intermediate=5, target_modules=["layer"], init_weights=False, **settings
    )
    layer = get_peft_model(OneLayer(), config).base_model.model.layer.train()
    if plain:  # what torch.compile and FSDP go through
        layer._readable_weights = lambda x, names: None
    return layer


def watch(module, x):
    """(reads of x in forward, largest result in forward and backward)."""
    with Operations(x) as operations:
        y = module(x)
        reads = operations.reads
        y.backward(torch.ones_like(y))
    return reads, operations.largest


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
def test_nothing_of_the_base_weights_size_is_formed_and_x_is_read_once(plain, dropout):
    """Beside the base layer's own read of x."""
    layer = adapted(plain, lora_dropout=dropout)
    x = torch.randn(TOKENS, K, requires_grad=True)
    reads, largest = watch(layer, x)
    assert reads == 2
    assert largest == TOKENS * K < D * K
    assert all(
        parameter.grad is not None for name, parameter in layer.named_parameters() if parameter.requires_grad
    )
    assert layer.factoredlora_base["default"].weight.grad is None


def test_the_watch_sees_a_weight_update_that_is_written_out():
    layer = adapted()
    x = torch.randn(TOKENS, K, requires_grad=True)
    _, largest = watch(lambda x: layer.base_layer(x) + x @ layer.get_delta_weight("default").t(), x)
    assert largest == D * K


def test_a_merge_of_two_adapters_is_of_both_or_of_none():
    layer = adapted()
    layer.update_layer("second", FactoredLoraConfig(r=2, r_intermediate=4, init_weights=False), 2, 4.0)
    weight = layer.base_layer.weight.detach().clone()
    nan = layer.factoredlora_B2["second"].weight.data
    kept, nan[0, 0] = nan[0, 0].clone(), float("nan")
    with pytest.raises(MergeError, match=r"adapter second.*the base layer is unchanged"):
        layer.merge(safe_merge=True, adapter_names=["default", "second"])
    assert torch.equal(layer.base_layer.weight, weight)
    assert layer.merged_adapters == []

    nan[0, 0] = kept
    expected = weight + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    layer.merge(safe_merge=True, adapter_names=["default", "second"])
    assert layer.merged_adapters == ["default", "second"]
    torch.testing.assert_close(layer.base_layer.weight, expected)


def test_no_tokens_at_all():
    x = torch.zeros(0, K, requires_grad=True)
    layer = adapted()
    layer(x).sum().backward()
    assert x.grad.shape == (0, K)
    assert not layer.factoredlora_A["default"].weight.grad.any()
