"""Engines of vLLM with mixed batches of adapters, against PEFT. Run by `make acceptance-vllm`."""

import pytest
from peft import LoraConfig
from vllm_models import PROMPTS, Reference, random_adapter, random_base, run_engine

from braidlora import FactoredLoraConfig, MultiLoraConfig

pytest.importorskip("vllm", reason="vLLM has an environment of its own; see docs/serving.md")
pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]

QV, ALL = ["q_proj", "v_proj"], "all-linear"
CONFIGS = {
    "lora": LoraConfig(r=8, target_modules=ALL),
    "alora": MultiLoraConfig(share="B", num_experts=3, r=8, target_modules=QV),
    "alora-all": MultiLoraConfig(share="B", num_experts=3, r=8, target_modules=ALL, router_temperature=0.5),
    "hydralora": MultiLoraConfig(share="A", num_experts=5, r=4, target_modules=ALL, use_rslora=True),
    "moelora": MultiLoraConfig(share="none", num_experts=2, r=8, target_modules=QV),
    "one": MultiLoraConfig(num_experts=1, r=4, target_modules=ALL),
    "patterns": MultiLoraConfig(
        share="none", num_experts=3, r=4, target_modules=ALL,
        rank_pattern={"q_proj": 8, "down_proj": 2}, alpha_pattern={"v_proj": 5, "layers.1.self_attn.o_proj": 31},
    ),
    "factored": FactoredLoraConfig(r=4, r_intermediate=6, target_modules=ALL),
}  # fmt: skip
NAMES = [None, *CONFIGS]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: random_adapter(base, folder / name, config, seed)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture(scope="module")
def reference(base, adapters):
    return Reference(base, adapters)


@pytest.fixture(scope="module")
def requests(reference):
    """Every adapter and the base with every prompt, and a round in another order; the adapters do change the tokens."""
    forward = [[name, prompt] for prompt in PROMPTS for name in NAMES]
    return [forward, forward[::-1]]


def check(reference, rounds, answers):
    for requests, round_ in zip(rounds, answers, strict=True):
        for (name, prompt), answer in zip(requests, round_, strict=True):
            reference.check(name, prompt, answer)
    chosen = {str(name): [a["tokens"] for (n, _), a in zip(rounds[0], answers[0], strict=True) if n == name]
              for name in NAMES}  # fmt: skip
    assert len({str(tokens) for tokens in chosen.values()}) == len(NAMES), "the adapters do not differ"


def test_all_adapters_in_one_batch(tmp_path, base, adapters, reference, requests):
    check(reference, requests, run_engine(tmp_path, base, adapters, requests))


def test_fewer_slots_than_adapters(tmp_path, base, adapters, reference, requests):
    """Two slots for eight adapters: every slot holds adapters of other kinds, one after the other."""
    check(reference, requests, run_engine(tmp_path, base, adapters, requests, max_loras=2, max_cpu_loras=3))


@pytest.mark.parametrize("sharded", [False, True])
def test_tensor_parallel(tmp_path, base, adapters, reference, requests, sharded):
    """Row-parallel layers see a part of x each; the router needs the whole sum before its softmax."""
    answers = run_engine(
        tmp_path, base, adapters, requests, tensor_parallel_size=2, fully_sharded_loras=sharded
    )
    check(reference, requests, answers)


def test_prefix_caching(tmp_path, base, adapters, reference):
    """A prefix is found again within one adapter and never taken from another."""
    long = [1, *(20 + (7 * i) % 400 for i in range(140))]
    rounds = [[[name, [*long, 9]] for name in NAMES], [[name, [*long, 11]] for name in NAMES]]
    answers = run_engine(tmp_path, base, adapters, rounds, enable_prefix_caching=True, max_num_seqs=4)
    check(reference, rounds, answers)
    assert all(answer["cached"] == 0 for answer in answers[0])
    assert all(answer["cached"] >= 128 for answer in answers[1])
