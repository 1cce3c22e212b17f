"""PEFT's own tests with this package's configurations as their parameters.

Collected by `tests/acceptance/test_peft_suite.py` in a process of its own, with PEFT's test folder on the path as
the package `peft_own_tests` and folders of tiny models in $TINY_MODELS.
"""

import contextlib
import inspect
import os
import types
from pathlib import Path

import peft_own_tests.test_custom_models as custom_models
import peft_own_tests.testing_common as common
import pytest
import torch
from peft_own_tests.testing_utils import set_init_weights_false
from transformers import AutoModelForCausalLM

from braidlora import FactoredLoraConfig, MultiLoraConfig

PARAMETERS = "test_name, model_id, config_cls, config_kwargs"


def case(name, model_id, config_cls=MultiLoraConfig, **settings):
    return (name, model_id, config_cls, {"r": 4, **settings})


def factored(name, model_id, **settings):
    return case(name, model_id, FactoredLoraConfig, r_intermediate=6, **settings)


CUSTOM_CASES = [
    case("LoRA", "MLP", target_modules=["lin0"], num_experts=1),
    case("LoRA Conv1D", "EmbConv1D", target_modules=["conv1d"], num_experts=1),
    case("ALoRA, a string", "MLP", target_modules="lin0"),
    case("ALoRA", "MLP", target_modules=["lin0", "lin1"]),
    case("ALoRA, a module to save", "MLP", target_modules=["lin0"], modules_to_save=["lin1"]),
    case("ALoRA, eight experts", "MLP", target_modules=["lin0"], num_experts=8),
    case("ALoRA, dropout per expert", "MLP", target_modules=["lin0"], lora_dropout=0.1, dropout_mask="per_expert"),
    case("ALoRA, patterns", "MLP", target_modules=["lin0", "lin1"], rank_pattern={"lin0": 2},
         alpha_pattern={"lin1": 3}, use_rslora=True),
    case("ALoRA Conv1D", "EmbConv1D", target_modules=["conv1d"]),
    case("HydraLoRA", "MLP", target_modules=["lin0", "lin1"], share="A"),
    case("HydraLoRA Conv1D", "EmbConv1D", target_modules=["conv1d"], share="A"),
    case("MoE-LoRA", "MLP", target_modules=["lin0", "lin1"], share="none", num_experts=2),
    case("MoE-LoRA Conv1D", "EmbConv1D", target_modules=["conv1d"], share="none"),
    factored("Factored, a string", "MLP", target_modules="lin0"),
    factored("Factored", "MLP", target_modules=["lin0", "lin1"]),
    factored("Factored, a module to save", "MLP", target_modules=["lin0"], modules_to_save=["lin1"]),
    factored("Factored, patterns", "MLP", target_modules=["lin0", "lin1"], rank_pattern={"lin0": 2},
             alpha_pattern={"lin1": 3}, use_rslora=True, lora_dropout=0.1),
    factored("Factored Conv1D", "EmbConv1D", target_modules=["conv1d"]),
]  # fmt: skip

MODELS = {path.name: str(path) for path in sorted(Path(os.environ["TINY_MODELS"]).iterdir())}
TARGETS = {"llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "o_proj"], "gpt2": ["c_attn"]}
DECODER_CASES = [
    case(f"{name} {share} {experts}", path, task_type="CAUSAL_LM", target_modules=TARGETS[name], share=share,
         num_experts=experts)
    for name, path in MODELS.items()
    for share, experts in (("B", 1), ("B", 3), ("A", 3), ("none", 2))
] + [
    factored(f"{name} factored", path, task_type="CAUSAL_LM", target_modules=TARGETS[name])
    for name, path in MODELS.items()
]  # fmt: skip


def merging_not_supported(model_id, config_cls, config_kwargs):
    if config_cls is MultiLoraConfig and config_kwargs.get("num_experts", 3) > 1:
        pytest.skip("a token-routed adapter cannot be merged")


# PEFT keeps closed lists of its own methods; this is the entry they would have for ours.
for module in (common, custom_models):
    module._skip_if_merging_not_supported = merging_not_supported
    module.hub_online_once = lambda model_id: contextlib.nullcontext()


def parametrised(function, cases):
    """A copy of a test function whose parameters are `cases`; None if it takes others."""
    marks = getattr(function, "pytestmark", [])
    if not any(mark.name == "parametrize" and mark.args[0] == PARAMETERS for mark in marks):
        return None
    copy = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.pytestmark = [m for m in marks if not (m.name == "parametrize" and m.args[0] == PARAMETERS)]
    return pytest.mark.parametrize(PARAMETERS, cases, ids=[c[0] for c in cases])(copy)


TestCustomModels = type(
    "TestCustomModels",
    (custom_models.TestPeftCustomModel,),
    {
        name: parametrised(function, CUSTOM_CASES)
        for name, function in vars(custom_models.TestPeftCustomModel).items()
        if name.startswith("test_")
    },
)


@pytest.fixture(autouse=True)
def _rate_that_suits_the_method(request, monkeypatch):
    """PEFT's tests take three steps of SGD at 0.5, and at other rates for a list of its own methods.

    A router hardly moves at 0.5, and a product of four matrices runs away to NaN.
    """
    rates = {
        ("test_only_params_are_updated", MultiLoraConfig): 100.0,
        ("test_parameters_after_loading_model", FactoredLoraConfig): 0.01,
    }
    parameters = getattr(request.node, "callspec", None)
    rate = parameters and rates.get((request.node.originalname, parameters.params.get("config_cls")))
    if rate:
        sgd = torch.optim.SGD
        monkeypatch.setattr(torch.optim, "SGD", lambda parameters, lr: sgd(parameters, lr=rate))


class TestDecoders(common.PeftCommonTester):
    transformers_class = AutoModelForCausalLM

    def prepare_inputs_for_testing(self):
        ids = torch.tensor([[1, 1, 1], [1, 2, 1]])
        return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}


NAMES = ("model_id", "config_cls", "config_kwargs")
FURTHER = {
    "_test_generate_pos_args": {"raises_err": False},
    "_test_add_adapter_no_autocast_adapter_dtype": {"dtype": torch.bfloat16},
    "_test_passing_input_embeds_works": {"test_name": "input embeddings"},
}
ASK_GRADIENTS_OF_ALL = ("_test_training_gradient_checkpointing", "_test_training_layer_indexing")


def decoder_test(name, further):
    def test(self, test_name, model_id, config_cls, config_kwargs):
        if config_cls is FactoredLoraConfig and name in ASK_GRADIENTS_OF_ALL:
            pytest.skip(
                "the common base is frozen, and the test requires a gradient for every tensor of the adapter"
            )
        if "merge" in name or name in ("_test_unload_adapter", "_test_disable_adapter"):
            config_kwargs = set_init_weights_false(config_cls, config_kwargs)
        arguments = dict(zip(NAMES, (model_id, config_cls, config_kwargs), strict=True))
        getattr(self, name)(**arguments, **further)

    test.__name__ = name.removeprefix("_")
    return pytest.mark.parametrize(PARAMETERS, DECODER_CASES, ids=[c[0] for c in DECODER_CASES])(test)


for _name, _function in inspect.getmembers(common.PeftCommonTester, inspect.isfunction):
    if not _name.startswith("_test_"):
        continue
    _required = {
        parameter
        for parameter, what in inspect.signature(_function).parameters.items()
        if what.default is inspect.Parameter.empty
    } - {"self"}
    if _required == {*NAMES, *FURTHER.get(_name, ())}:
        setattr(TestDecoders, _name.removeprefix("_"), decoder_test(_name, FURTHER.get(_name, {})))
