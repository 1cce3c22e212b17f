"""The balance loss in the loss's own scale, whatever loop, checkpoint, mask or compiler there is.

The reference is the same model in plain operations, its balance losses written out and added to the loss by hand.
"""

import contextlib
import copy
import functools
import gc
import pickle
import re
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from braidlora import MultiLoraConfig, MultiLoraLayer
from braidlora.adapters import functional, hotswap_adapter, with_balance_loss
from braidlora.adapters._balance import balance_scopes

C = 0.7
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
IDS = torch.randint(1, 64, (8, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[1, :4], MASK[3, :6], MASK[6, :1], MASK[7, 5:] = 0, 0, 0, 0
LABELS = IDS.masked_fill(MASK == 0, -100)
LABELS[0, :5] = -100
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
# Padded on the right alone: rows of attention that are masked as a whole have no derivatives in eager attention.
RIGHT_PADDED = {**BATCH, "attention_mask": torch.ones_like(IDS), "labels": IDS.clone()}
RIGHT_PADDED["attention_mask"][3:, 6:], RIGHT_PADDED["labels"][3:, 6:] = 0, -100
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def model_of(balance=C, attention="sdpa", **settings):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention))
    settings = {"target_modules": ["q_proj", "down_proj"], "init_weights": False, "r": 4, **settings}
    model = get_peft_model(base, MultiLoraConfig(balance_loss=balance, **settings)).double().train()
    with torch.no_grad():  # uneven routers
        for layer in layers_of(model):
            layer.braidlora_router["default"].weight.mul_(4.0)
    return model


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, MultiLoraLayer)]


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    found = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    return found


def imbalance(w_TN):
    """The squared coefficient of variation of the experts' importance, as Shazeer et al. define it."""
    importance = w_TN.sum(0)
    return importance.var(unbiased=False) / importance.mean().square()


@contextlib.contextmanager
def inputs_of(model):
    """(layer, x) of every adapted layer that runs within."""
    inputs = []
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.append((layer, args[0])))
        for layer in layers_of(model)
    ]
    yield inputs
    for handle in handles:
        handle.remove()


def by_hand(passes, coefficient=C):
    """Gradients of Σ scale · (loss + c · Σ balance), passes: (batch, scale) pairs."""
    model = model_of(0.0, fused=False)
    total = 0.0
    for batch, scale in passes:
        with inputs_of(model) as inputs:
            loss = model(**batch).loss
        for layer, x in inputs:
            w = torch.softmax(x @ layer.braidlora_router["default"].weight.T, -1)
            mask = batch.get("attention_mask")
            loss = loss + coefficient * imbalance(w.flatten(0, 1) if mask is None else w[mask.bool()])
        total = total + scale * loss
    total.backward()
    return gradients(model)


@functools.cache
def by_hand_once():
    return by_hand([(BATCH, 1.0)])


def assert_same(ours, right, tolerance=1e-8):
    assert ours.keys() == right.keys()
    for name, gradient in right.items():
        torch.testing.assert_close(
            ours[name], gradient, atol=tolerance, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def parts(k):
    return [{name: tensor[i::k] for name, tensor in BATCH.items()} for i in range(k)]


def checkpointed(model, how):
    if how is not None:
        model.enable_input_require_grads()
        settings = {"use_reentrant": how == "reentrant"}
        if how == "selective":
            saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
            settings["context_fn"] = partial(create_selective_checkpoint_contexts, saved)
        model.gradient_checkpointing_enable(settings)
    return model


CHECKPOINTS = pytest.mark.parametrize("how", [None, "reentrant", "non-reentrant", "selective"])
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])


@CHECKPOINTS
@FUSED
@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 1 / 16, 1024.0])
def test_it_has_the_losss_scale_and_counts_no_padding(how, fused, scale):
    """1/k of gradient accumulation, or the factor of a scaler."""
    model = checkpointed(model_of(fused=fused), how)
    loss = model(**BATCH).loss
    (loss * scale).backward()
    right = by_hand_once()
    assert_same({name: g / scale for name, g in gradients(model).items()}, right)
    assert not torch.allclose(
        right["base_model.model.model.layers.0.self_attn.q_proj.braidlora_router.default.weight"],
        by_hand([(BATCH, 1.0)], 0.0)[
            "base_model.model.model.layers.0.self_attn.q_proj.braidlora_router.default.weight"
        ],
        atol=1e-3,
    )


@CHECKPOINTS
@pytest.mark.parametrize("k", [2, 4])
def test_accumulated_passes_are_the_mean_of_their_balances(how, k):
    model = checkpointed(model_of(), how)
    for batch in parts(k):
        (model(**batch).loss / k).backward()
    assert_same(gradients(model), by_hand([(batch, 1 / k) for batch in parts(k)]))


@CHECKPOINTS
def test_two_passes_with_scales_of_their_own_in_one_backward(how):
    model = checkpointed(model_of(), how)
    first, second = parts(2)
    second = {name: tensor[:, :7] for name, tensor in second.items()}
    (0.25 * model(**first).loss + 3.0 * model(**second).loss).backward()
    assert_same(gradients(model), by_hand([(first, 0.25), (second, 3.0)]))


def test_the_share_of_the_same_rows_does_not_grow_with_the_number_of_passes():
    """The same rows in every pass: then k passes of loss / k are one pass exactly."""
    batch = {name: tensor[:2] for name, tensor in BATCH.items()}
    right = by_hand([(batch, 1.0)])
    for k in (1, 4, 16):
        model = model_of()
        for _ in range(k):
            (model(**batch).loss / k).backward()
        assert_same(gradients(model), right)


@CHECKPOINTS
@FUSED
def test_a_loss_of_ones_own(how, fused):
    def own_loss(logits):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())

    model = checkpointed(model_of(fused=fused), how)
    inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    loss = with_balance_loss(model, own_loss(model(**inputs).logits))
    (loss / 8).backward()
    assert_same({name: g * 8 for name, g in gradients(model).items()}, by_hand_once())

    with pytest.warns(UserWarning, match="with_balance_loss"):
        own_loss(model(**inputs).logits).backward()
    assert_same(gradients(model), by_hand_once())
    own_loss(model(**inputs).logits).backward()  # and only once: a warning here would be an error
    with_balance_loss(model, own_loss(model(**inputs).logits), 0.5).backward()
    model.zero_grad()
    assert with_balance_loss(model_of(0.0), torch.ones(())) == 1.0


@pytest.mark.parametrize("inner", [False, True])
def test_several_passes_behind_one_loss(inner):
    """As in preference training; and with the transformer called below the model that marks its results."""
    model = model_of()
    first, second = ({**b, "labels": None} for b in parts(2))

    def score(batch):
        if inner:
            llama = model.base_model.model
            return llama.lm_head(llama.model(batch["input_ids"]).last_hidden_state).square().mean()
        return model(**batch).logits.square().mean()

    loss = with_balance_loss(model, score(first) - score(second))
    value = loss.item()
    (loss * 2.0).backward()
    ours = gradients(model)
    assert value == pytest.approx((score(first) - score(second)).item())
    reference = model_of(0.0, fused=False)
    total = 0.0
    for batch, sign in ((first, 1.0), (second, -1.0)):
        llama = reference.base_model.model
        mask = None if inner else batch["attention_mask"]
        with inputs_of(reference) as inputs:
            hidden = llama.model(batch["input_ids"], attention_mask=mask).last_hidden_state
        total = total + sign * llama.lm_head(hidden).square().mean()
        for layer, x in inputs:
            w = torch.softmax(x @ layer.braidlora_router["default"].weight.T, -1)
            total = total + C * imbalance(w.flatten(0, 1) if inner else w[batch["attention_mask"].bool()])
    (2.0 * total).backward()
    assert_same(ours, gradients(reference))


def test_one_graph_twice_with_scales_of_its_own():
    model = model_of()
    loss = model(**BATCH).loss
    (loss * 0.5).backward(retain_graph=True)
    half = gradients(model)
    (loss * 4.0).backward()
    right = by_hand_once()
    assert_same({name: g * 2 for name, g in half.items()}, right)
    assert_same({name: g / 4 for name, g in gradients(model).items()}, right)


@pytest.mark.parametrize("shape", ["tuple", "positional mask", "no mask", "4-D mask"])
def test_other_forms_of_call_and_result(shape):
    model = model_of()
    if shape == "tuple":
        loss = model(**BATCH, return_dict=False)[0]
    elif shape == "positional mask":
        loss = model.base_model(IDS, MASK, labels=LABELS).loss
    else:
        batch = {"input_ids": IDS, "labels": LABELS}
        if shape == "4-D mask":
            batch["attention_mask"] = torch.ones(8, 1, 9, 9, dtype=torch.bool).tril()
        loss = model(**batch).loss
    (loss / 2).backward()
    batch = (
        BATCH if "mask" not in shape or shape == "positional mask" else {"input_ids": IDS, "labels": LABELS}
    )
    assert_same({name: g * 2 for name, g in gradients(model).items()}, by_hand([(batch, 1.0)]))


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("model", None), ("blocks", "non-reentrant"),
        pytest.param("model", "non-reentrant", marks=pytest.mark.slow),
        pytest.param("blocks", None, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_compiled(what, how):
    torch._dynamo.reset()
    model = checkpointed(model_of(), how)
    if what == "model":
        run = torch.compile(model, backend="aot_eager")
    else:
        run = model
        for block in model.base_model.model.model.layers:
            block.compile(backend="aot_eager")
    for scale in (0.25, 8.0):
        (run(**BATCH).loss * scale).backward()
        assert_same({name: g / scale for name, g in gradients(model).items()}, by_hand_once())


def test_compiled_with_a_loss_of_ones_own():
    torch._dynamo.reset()
    model = model_of()
    run = torch.compile(model, backend="aot_eager")
    logits = run(input_ids=IDS, attention_mask=MASK).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    (with_balance_loss(model, loss) / 8).backward()
    assert_same({name: g * 8 for name, g in gradients(model).items()}, by_hand_once())


def test_function_transforms():
    model = model_of(attention="eager")
    parameters = {name: p.detach() for name, p in trained(model).items()}

    def loss(p):
        return torch.func.functional_call(model, p, (), RIGHT_PADDED).loss / 4

    right = {name: g / 4 for name, g in by_hand([(RIGHT_PADDED, 1.0)]).items()}
    assert_same(torch.func.grad(loss)(parameters), right)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    value, along = torch.func.jvp(loss, (parameters,), (tangents,))
    assert value.item() == pytest.approx(model(**RIGHT_PADDED).loss.item() / 4)
    assert along.item() == pytest.approx(sum((right[name] * t).sum() for name, t in tangents.items()).item())


def test_second_order():
    def norm(gradient_of):
        loss, inputs = gradient_of
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    model, reference = model_of(attention="eager"), model_of(0.0, "eager", fused=False)
    ours = norm((model(**RIGHT_PADDED).loss * 0.5, list(trained(model).values())))
    with inputs_of(reference) as inputs:
        loss = reference(**RIGHT_PADDED).loss
    for layer, x in inputs:
        w = torch.softmax(x @ layer.braidlora_router["default"].weight.T, -1)
        loss = loss + C * imbalance(w[RIGHT_PADDED["attention_mask"].bool()])
    for a, b in zip(ours, norm((loss * 0.5, list(trained(reference).values()))), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-6)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, i):
        return {name: tensor[i] for name, tensor in BATCH.items()}


def trainers_step(tmp_path, k, loss_function=None, known=None, **arguments):
    """The gradients of a Trainer's first step; `known` is given the model before it starts."""
    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.update({name: p.grad.clone() for name, p in trained(kwargs["model"]).items()})

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8 // k, gradient_accumulation_steps=k,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", max_grad_norm=0.0, **arguments,
    )  # fmt: skip
    model = model_of()
    if known is not None:
        known.append(model)
    InOrder(
        model=model, args=settings, train_dataset=Rows(), callbacks=[Keep()], compute_loss_func=loss_function
    ).train()
    return found


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plain_trainer_weighs_passes_by_their_tokens(k, checkpointing, tmp_path):
    """Its loss is a sum over a pass divided by the whole step's tokens: the scale alone would count k times."""
    found = trainers_step(tmp_path, k, gradient_checkpointing=checkpointing)
    size = 8 // k
    passes = [{name: t[i * size : (i + 1) * size] for name, t in BATCH.items()} for i in range(k)]
    counts = [(batch["labels"][:, 1:] != -100).sum().item() for batch in passes]
    right = by_hand([(batch, count / sum(counts)) for batch, count in zip(passes, counts, strict=True)])
    assert_same(found, right, tolerance=1e-7)


def test_a_trainer_with_a_loss_of_ones_own(tmp_path):
    def loss_function(outputs, labels, num_items_in_batch=None):
        targets = labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum"
        )
        return with_balance_loss(
            known[0], loss / num_items_in_batch, (targets != -100).sum() / num_items_in_batch
        )

    known = []
    found = trainers_step(tmp_path, 2, loss_function, known)
    passes = [{name: t[i * 4 : (i + 1) * 4] for name, t in BATCH.items()} for i in range(2)]
    counts = [(batch["labels"][:, 1:] != -100).sum().item() for batch in passes]
    right = by_hand([(batch, count / sum(counts)) for batch, count in zip(passes, counts, strict=True)])
    assert_same(found, right, tolerance=1e-7)


def test_trls_trainer_as_the_docs_have_it(tmp_path):
    """The same row in every pass: then four accumulated passes are one pass of four rows."""
    trl = pytest.importorskip("trl", reason="needs trl (make acceptance)")
    from datasets import Dataset

    page = (Path(__file__).parents[2] / "docs" / "reference" / "methods.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(class BalancedSFTTrainer.*?)```", page, flags=re.S)
    names = {"SFTTrainer": trl.SFTTrainer, "with_balance_loss": with_balance_loss}
    exec(example, names)
    row = IDS[0].tolist()
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))

    def step(k):
        found = {}

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                found.update({name: p.grad.clone() for name, p in trained(kwargs["model"]).items()})

        settings = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4 // k, gradient_accumulation_steps=k,
            report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", max_grad_norm=0.0,
        )  # fmt: skip
        names["BalancedSFTTrainer"](
            model=model_of(),
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": [row] * 4}),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="[PAD]", eos_token="[PAD]"
            ),
            callbacks=[Keep()],
        ).train()
        return found

    batch = {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1]), "labels": IDS[:1]}
    right = by_hand([(batch, 1.0)])
    for k in (1, 4):
        # TRL computes log-probabilities in float32.
        assert_same(step(k), right, tolerance=1e-4)


def test_nothing_is_left_after_a_pass():
    model = model_of()
    (scope,) = balance_scopes(model)
    assert all(layer.balance is scope for layer in layers_of(model))
    batch = {name: tensor.clone() for name, tensor in BATCH.items()}
    masks = []
    original = scope.begin
    scope.begin = lambda gradient, mask, *rest: (
        masks.append(weakref.ref(mask)) or original(gradient, mask, *rest)
    )
    for _ in range(3):
        with_balance_loss(model, model(**batch).loss).backward()
        model(**batch)  # forward without backward
        assert (scope._notes, scope._latest, scope._claim, scope.forward) == ({}, None, None, None)
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)
    model.generate(input_ids=IDS[:2], max_new_tokens=2)
    with model.disable_adapter():
        model(**batch)
    gc.collect()
    assert [ref() for ref in masks] == [None, None, None]
    assert scope.forward is None


def test_in_evaluation_and_without_a_balance_loss_nothing_is_added():
    model = model_of().eval()
    model(**BATCH).loss.backward()
    assert_same(gradients(model), by_hand([(BATCH, 1.0)], 0.0))
    plain = model_of(0.0)
    assert not plain.base_model.model._forward_hooks
    assert type(plain(**BATCH).loss.grad_fn).__name__ != "_MarkBackward"


def test_results_stay_ordinary_tensors():
    model = model_of()
    output = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
    output.logits.mul_(0.5)
    assert not output.logits._is_view()
    loss = model(**BATCH).loss
    loss /= 4
    loss.backward()
    assert_same({name: g * 4 for name, g in gradients(model).items()}, by_hand_once())


def test_copies_have_scopes_of_their_own():
    model = model_of()
    (scope,) = balance_scopes(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (theirs,) = balance_scopes(other)
        assert theirs is not scope
        (other(**BATCH).loss / 2).backward()
        assert_same({name: g * 2 for name, g in gradients(other).items()}, by_hand_once())


def test_two_adapters_and_transformers_own_way_of_adding_one():
    model = model_of()
    model.add_adapter("second", MultiLoraConfig(target_modules=["v_proj"], balance_loss=0.1))
    assert len(balance_scopes(model)) == 1
    assert len(model.base_model.model._forward_hooks) == 1
    (model(**BATCH).loss / 2).backward()
    assert_same({name: g * 2 for name, g in gradients(model).items()}, by_hand_once())

    torch.manual_seed(0)
    native = LlamaForCausalLM(LlamaConfig(**SIZES)).double().train()
    native.add_adapter(MultiLoraConfig(target_modules=["q_proj"], balance_loss=C))
    native.double()
    (router,) = (p for name, p in native.named_parameters() if "layers.0" in name and "router" in name)

    def router_gradient(scale):
        router.grad = None
        (native(**BATCH).loss * scale).backward()
        return router.grad

    torch.testing.assert_close(router_gradient(1.0), router_gradient(8.0) / 8.0)


def test_nothing_is_left_on_a_base_without_the_adapter():
    base = model_of().unload()
    assert not base._forward_hooks
    assert not base._forward_pre_hooks
    model = model_of()
    model.add_adapter("plain", MultiLoraConfig(target_modules=["v_proj"]))
    base = model.get_base_model()
    model.delete_adapter("default")
    assert not base._forward_hooks
    assert not base._forward_pre_hooks
    one = MultiLoraConfig(num_experts=1, target_modules=["q_proj"], balance_loss=C)
    base = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), one).merge_and_unload()
    assert not base._forward_hooks
    assert not base._forward_pre_hooks


def test_weights_exchanged_for_those_of_an_adapter_with_another_balance_loss(tmp_path):
    balanced, plain = model_of(), model_of(0.0)
    balanced.save_pretrained(tmp_path / "balanced")
    plain.save_pretrained(tmp_path / "plain")
    hotswap_adapter(plain, tmp_path / "balanced")
    (plain(**BATCH).loss / 2).backward()
    assert_same({name: g * 2 for name, g in gradients(plain).items()}, by_hand_once())
    hotswap_adapter(balanced, tmp_path / "plain")
    assert not balanced.get_base_model()._forward_hooks
    balanced(**BATCH).loss.backward()
    assert_same(gradients(balanced), by_hand([(BATCH, 1.0)], 0.0))


def test_with_a_mask_of_any_device_and_no_token_at_all():
    w = torch.softmax(torch.randn(6, 3, dtype=torch.float64), -1).requires_grad_()
    for mask in (torch.tensor([1, 1, 0, 1, 0, 0]).bool(), torch.zeros(6).bool(), None):
        kept = w if mask is None else w[mask]
        loss = functional.balance_loss(w, mask)
        if len(kept):
            torch.testing.assert_close(loss, imbalance(kept))
        (wanted,) = torch.autograd.grad(loss, w)
        torch.testing.assert_close(functional.balance_gradient(w.detach(), mask).expand_as(w), wanted)


def test_stock_lora_is_left_alone():
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    assert not base._forward_hooks
