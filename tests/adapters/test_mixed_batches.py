"""`adapter_names`: every row of a batch gets what its adapter alone gives it. Reference: one adapter at a time."""

import copy
import importlib.metadata

import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from tiny import llama
from torch import nn
from transformers import (
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from braidlora import FactoredLoraConfig, FactoredLoraLayer, MultiLoraConfig, MultiLoraLayer

ROWS = ["fr", "de", "__base__", "fr", "it", "de"]
TUNERS = {
    "multi": [
        MultiLoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False, lora_alpha=32),
        MultiLoraConfig(
            share="none", r=2, num_experts=2, target_modules=["v_proj", "up_proj"], init_weights=False
        ),
        MultiLoraConfig(share="A", num_experts=1, target_modules=["down_proj"], init_weights=False),
    ],
    "factored": [
        FactoredLoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False),
        FactoredLoraConfig(
            r=2, r_intermediate=6, target_modules=["v_proj", "up_proj"], init_weights=False
        ),
        FactoredLoraConfig(r=8, target_modules=["down_proj"], init_weights=False),
    ],
}  # fmt: skip


def build(base, tuner, **settings):
    """`base` with three adapters of other ranks, experts, shares and targets, in eval mode."""
    torch.manual_seed(1)
    configs = copy.deepcopy(TUNERS[tuner])
    for config in configs:
        for name, value in settings.items():
            setattr(config, name, copy.deepcopy(value))
    model = get_peft_model(base, configs[0], adapter_name="fr")
    model.add_adapter("de", configs[1])
    model.add_adapter("it", configs[2])
    return model.double().eval()


def alone(model, name, run):
    """`run()` under one adapter, or under none."""
    if name == "__base__":
        with model.disable_adapter():
            return run()
    before = model.active_adapters
    model.set_adapter(name)
    try:
        return run()
    finally:
        model.base_model.set_adapter(before)


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(params=TUNERS)
def tuner(request):
    return request.param


@torch.no_grad()
def test_every_row_is_as_with_its_adapter_alone(tuner):
    model = build(llama(), tuner)
    ids = torch.randint(1, 64, (len(ROWS), 7))
    mixed = model(input_ids=ids, adapter_names=ROWS).logits
    for row, name in enumerate(ROWS):
        expected = alone(model, name, lambda: model(input_ids=ids).logits)[row]
        torch.testing.assert_close(mixed[row], expected, atol=1e-12, rtol=0)
    assert (mixed[0] - mixed[3]).abs().max() > 0
    for name in ("fr", "de", "it", "__base__"):
        expected = alone(model, name, lambda: model(input_ids=ids).logits)
        given = model(input_ids=ids, adapter_names=[name] * len(ids)).logits
        torch.testing.assert_close(given, expected, atol=1e-12, rtol=0)
    assert model.active_adapters == ["fr"]
    assert hooks(model) == 0


@torch.no_grad()
def test_positional_arguments_and_a_plain_model(tuner):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.v_proj = nn.Linear(8, 16), nn.Linear(16, 4)
            self.q_proj, self.down_proj = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.down_proj(self.q_proj(self.v_proj(self.up_proj(x))))

    model = build(Plain(), tuner)
    x = torch.randn(len(ROWS), 8, dtype=torch.float64)
    mixed = model(x, adapter_names=ROWS)
    for row, name in enumerate(ROWS):
        torch.testing.assert_close(mixed[row], alone(model, name, lambda: model(x))[row], atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("how", ["beams", "config", "samples"])
def test_generation_repeats_the_names_as_it_repeats_the_rows(tuner, how):
    model = build(llama(), tuner)
    ids = torch.randint(1, 64, (3, 4))
    names = ["de", "fr", "__base__"]
    settings = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
    if how == "config":
        config = copy.deepcopy(model.generation_config)
        config.update(**settings)
        settings = {"generation_config": config}
    if how == "samples":
        settings = {"max_new_tokens": 5, "num_return_sequences": 2, "do_sample": True, "top_k": 1}
    mask = torch.ones_like(ids)
    mixed = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **settings)
    for row, name in enumerate(names):
        expected = alone(
            model,
            name,
            lambda row=row: model.generate(
                input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **settings
            ),
        )
        given = mixed[2 * row : 2 * row + 2, : expected.shape[1]]
        assert given.tolist() == expected.tolist(), name
    assert hooks(model) == 0


@pytest.mark.skipif(
    Version(importlib.metadata.version("peft")) < Version("0.21.2"),
    reason="before 0.21.2, PEFT's generate() of encoder-decoder models needs a transformers older than 5.18",
)
@torch.no_grad()
def test_encoder_and_decoder_under_beam_search(tuner):
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )
    configs = copy.deepcopy(TUNERS[tuner][:2])
    configs[0].target_modules, configs[1].target_modules = {"q", "v"}, {"wi", "v"}
    for config in configs:
        config.task_type = "SEQ_2_SEQ_LM"
    model = get_peft_model(base, configs[0], adapter_name="fr")
    model.add_adapter("de", configs[1])
    model = model.double().eval()
    ids = torch.randint(2, 64, (3, 5))
    names = ["de", "__base__", "fr"]
    mixed = model(input_ids=ids, decoder_input_ids=ids, adapter_names=names).logits
    settings = {"max_new_tokens": 5, "num_beams": 3, "attention_mask": torch.ones_like(ids)}
    tokens = model.generate(input_ids=ids, adapter_names=names, **settings)
    for row, name in enumerate(names):
        expected = alone(model, name, lambda: model(input_ids=ids, decoder_input_ids=ids).logits)
        torch.testing.assert_close(mixed[row], expected[row], atol=1e-12, rtol=0)
        beams = alone(model, name, lambda: model.generate(input_ids=ids, **settings))[row]
        length = min(beams.shape[-1], tokens.shape[1])
        assert tokens[row, :length].tolist() == beams[:length].tolist()


@torch.no_grad()
@pytest.mark.parametrize("active", ["fr", "it"])
def test_modules_trained_in_full_follow_the_rows(tuner, active):
    """Whichever adapter is active; "it" trains no head of its own, so its rows get the base's."""
    base = llama(LlamaForSequenceClassification, num_labels=3)
    configs = copy.deepcopy(TUNERS[tuner])
    configs[0].modules_to_save = ["score"]
    configs[1].modules_to_save = ["score"]
    model = get_peft_model(base, configs[0], adapter_name="fr")
    model.add_adapter("de", configs[1])
    model.add_adapter("it", configs[2])
    model = model.double().eval()
    score = model.base_model.model.score
    for name in ("fr", "de"):
        nn.init.normal_(score.modules_to_save[name].weight)
    model.set_adapter(active)
    ids = torch.randint(1, 64, (len(ROWS), 7))
    mixed = model(input_ids=ids, adapter_names=ROWS).logits
    for row, name in enumerate(ROWS):
        expected = alone(model, name, lambda: model(input_ids=ids).logits)[row]
        torch.testing.assert_close(mixed[row], expected, atol=1e-12, rtol=0)
    assert model.active_adapters == [active]


@torch.no_grad()
def test_trained_tokens_follow_the_rows(tuner):
    model = build(llama(), tuner, trainable_token_indices=[3, 5])
    wrapper = model.base_model.model.model.embed_tokens
    for delta in wrapper.token_adapter.trainable_tokens_delta.values():
        nn.init.normal_(delta)
    ids = torch.tensor([[3, 5, 9, 3]]).repeat(len(ROWS), 1)
    mixed = model(input_ids=ids, adapter_names=ROWS).logits
    for row, name in enumerate(ROWS):
        expected = alone(model, name, lambda: model(input_ids=ids).logits)[row]
        torch.testing.assert_close(mixed[row], expected, atol=1e-12, rtol=0)
    given = model(input_ids=ids, adapter_names=["__base__"] * len(ids)).logits
    torch.testing.assert_close(
        given, alone(model, "__base__", lambda: model(input_ids=ids).logits), atol=1e-12, rtol=0
    )


def test_the_base_layers_result_is_not_written_into(tuner):
    class Keeping(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.v_proj = Keeping(8, 8)

        def forward(self, x):
            return self.v_proj(x)

    config = copy.deepcopy(TUNERS[tuner][0])
    config.target_modules = {"v_proj"}
    model = get_peft_model(Plain(), config, adapter_name="fr").eval()
    x = torch.randn(2, 8, requires_grad=True)
    y = model(x, adapter_names=["__base__", "fr"])
    base = model.base_model.model.v_proj.base_layer
    assert torch.equal(base.kept, nn.functional.linear(x, base.weight, base.bias))
    y.sum().backward()
    (expected,) = torch.autograd.grad(model(x)[1].sum(), x)
    torch.testing.assert_close(x.grad[1], expected[1])
    torch.testing.assert_close(x.grad[0], base.weight.sum(0))


def test_what_does_not_fit_is_refused(tuner):
    model = build(llama(), tuner)
    ids = torch.randint(1, 64, (3, 4))
    cases = [
        (
            ["fr", "nope", "de"],
            ValueError,
            r"non-existing adapter\(s\): nope\. Known: de, fr, it, and __base__",
        ),
        (["fr", "de"], ValueError, "same as the number of inputs, but got 2 and 3"),
        (["fr"], ValueError, "but got 1 and 3"),
        ("fr", TypeError, "must be a list with one adapter name for every row"),
        (["fr", None, "de"], TypeError, "must be a list"),
    ]
    for names, error, message in cases:
        with pytest.raises(error, match=message):
            model(input_ids=ids, adapter_names=names)
        assert hooks(model) == 0, "an error leaves no hook behind"
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="num_beams and num_return_sequences as arguments"):
        model.generate(input_ids=ids, adapter_names=["fr", "de", "it"], max_new_tokens=2)
    with pytest.raises(ValueError, match="alora_offsets"):
        model.base_model._enable_peft_forward_hooks(alora_offsets=[1]).__enter__()
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(input_ids=ids, adapter_names=["fr", "de", "it"])


def test_rows_beside_an_adapter_that_trains_the_bases_biases():
    config = copy.deepcopy(TUNERS["multi"][0])
    config.bias = "all"
    model = get_peft_model(llama(), config, adapter_name="fr").eval()
    with pytest.warns(UserWarning, match="'fr' trains biases of the base model .* __base__ use them too"):
        model(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=["fr", "__base__"])


def test_merged_and_disabled_adapters(tuner):
    """As PEFT's LoRA: merged ones are refused, and where adapters are disabled all rows are the base's."""
    model = build(llama(), tuner)
    ids = torch.randint(1, 64, (3, 4))
    names = ["fr", "it", "__base__"]
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, adapter_names=names).logits, base)
    model.set_adapter("it")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter`"):
        model(input_ids=ids, adapter_names=names)
    model.unmerge_adapter()
    model(input_ids=ids, adapter_names=names)


class Block(nn.Module):
    """A mixture of experts as transformers writes it: rows and tokens are joined, every expert sees a selection."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(8, 8)}) for _ in range(2)])
        self.shared_expert = nn.ModuleDict({"v_proj": nn.Linear(8, 8)})
        self.q_proj = nn.Linear(8, 8)

    def forward(self, x):
        flat = self.q_proj(x).flatten(0, 1)
        out = self.shared_expert["v_proj"](flat)
        chosen = (flat.sum(-1) > 0).long()
        for number, expert in enumerate(self.experts):
            index = torch.where(chosen == number)[0]
            out = out.index_add(0, index, expert["up_proj"](flat[index]))
        return out.view_as(x)


@torch.no_grad()
def test_mixtures_of_experts_are_refused_where_rows_are_unknown(tuner):
    configs = copy.deepcopy(TUNERS[tuner])
    configs[0].target_modules = {"q_proj"}
    configs[1].target_modules = {"up_proj"}
    configs[2].target_modules = {"v_proj"}
    model = get_peft_model(Block(), configs[0], adapter_name="fr")
    model.add_adapter("de", configs[1])
    model.add_adapter("it", configs[2])
    model = model.double().eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"de adapt '.*experts\.0\.up_proj', an expert .*set_adapter"):
        model(x, adapter_names=["fr", "de"])
    with pytest.raises(ValueError, match=r"got 2 and 6 respectively. A 2-D input .*set_adapter"):
        model(x, adapter_names=["fr", "it"])
    # At one token a row the shared expert's rows are the batch's.
    one = x[:, :1]
    mixed = model(one, adapter_names=["it", "__base__"])
    torch.testing.assert_close(mixed[0], alone(model, "it", lambda: model(one))[0], atol=1e-12, rtol=0)


def test_a_layer_called_directly(tuner):
    model = build(llama(), tuner)
    layer = next(m for m in model.modules() if isinstance(m, (MultiLoraLayer, FactoredLoraLayer)))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    mixed = layer(x, adapter_names=["fr", "__base__"])
    torch.testing.assert_close(mixed[0], layer(x)[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(mixed[1], layer.base_layer(x)[1], atol=1e-12, rtol=0)
    assert torch.equal(layer(x, adapter_names=["de", "it"]), layer.base_layer(x)), "q_proj has neither"


def test_other_arguments_reach_the_base_layer(tuner):
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0, *, shift=0.0):
            return super().forward(x) * scale + shift

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.v_proj = Scaled(8, 8)

        def forward(self, x):
            return self.v_proj(x, 3.0, shift=0.5)

    config = copy.deepcopy(TUNERS[tuner][0])
    config.target_modules = {"v_proj"}
    model = get_peft_model(Plain(), config, adapter_name="fr").double().eval()
    x = torch.randn(2, 8, dtype=torch.float64)
    mixed = model(x, adapter_names=["fr", "__base__"])
    torch.testing.assert_close(mixed[0], model(x)[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(
        mixed[1], model.base_model.model.v_proj.base_layer(x, 3.0, shift=0.5)[1], atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("tuner", ["multi", pytest.param("factored", marks=pytest.mark.slow)])
def test_compiled(tuner):
    model = build(llama(), tuner)
    ids = torch.randint(1, 64, (3, 4))
    names = ["fr", "de", "__base__"]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(input_ids=ids, adapter_names=names).logits
        torch.testing.assert_close(compiled(input_ids=ids, adapter_names=names).logits, expected)
