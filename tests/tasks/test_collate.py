"""Batches: padding, and packing whose loss and gradients are those of the rows apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from braidlora.errors import ConfigError
from braidlora.tasks import IGNORED, Collator, check_packing, pad
from braidlora.tasks.packing import pack


def row(length, task=0, start=3):
    ids = [(start + 7 * at) % 60 + 1 for at in range(length)]
    return {"input_ids": ids, "labels": [IGNORED] * (length // 2) + ids[length // 2 :], "task_id": task}


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        **options,
    )
    return LlamaForCausalLM(config).double().eval()


def test_training_batches_are_padded_on_the_right():
    batch = Collator(0)([row(3, task=2), row(5, task=1)])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (2, 5), "attention_mask": (2, 5), "labels": (2, 5), "task_id": (2,),
    }  # fmt: skip
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["input_ids"][0].tolist() == [*row(3)["input_ids"], 0, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"][0].tolist() == [*row(3)["labels"], IGNORED, IGNORED]
    assert batch["task_id"].tolist() == [2, 1]
    assert Collator(0, pad_to_multiple_of=8)([row(3), row(9)])["input_ids"].shape == (2, 16)


def test_loss_positions_are_those_before_a_target():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [IGNORED] * 4 + [5, 6], "task_id": 0},
        {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3], "task_id": 1},
    ]
    assert Collator(0, loss_positions=True)(rows)["loss_positions"].tolist() == [[3, 4], [0, 1]]
    rows[1]["labels"] = [IGNORED, IGNORED, 3]
    assert Collator(0, loss_positions=True)(rows)["loss_positions"].tolist() == [[3, 4], [1, 5]], (
        "5 has no next"
    )
    none = [{"input_ids": [1, 2], "labels": [IGNORED, IGNORED], "task_id": 0}]
    assert Collator(0, loss_positions=True)(none)["loss_positions"].shape == (1, 0)
    packed = Collator(0, packing=True, cutoff=16, loss_positions=True)(rows)
    assert packed["labels"][0].tolist() == [IGNORED] * 4 + [5, 6, IGNORED, IGNORED, 3]
    assert packed["loss_positions"].tolist() == [[3, 4, 7]]
    classes = [{"input_ids": [5, 6], "labels": 3, "task_id": 1}]
    assert "loss_positions" not in Collator(0, "classify", loss_positions=True)(classes)


def test_classify_batches_have_a_class_per_row():
    rows = [{"input_ids": [5, 6], "labels": 3, "task_id": 1}, {"input_ids": [5], "labels": 0, "task_id": 0}]
    batch = Collator(9, "classify")(rows)
    assert batch["labels"].tolist() == [3, 0]
    assert batch["input_ids"].tolist() == [[5, 6], [5, 9]]
    with pytest.raises(ConfigError, match="cannot be packed"):
        Collator(9, "classify", packing=True)


def test_prompts_are_padded_on_the_left():
    input_ids, attention_mask = pad([[1, 2, 3], [4]], 0, left=True)
    assert input_ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=12), cutoff=st.integers(20, 60))
def test_packing_keeps_every_row_whole_and_apart(lengths, cutoff):
    rows = [row(length, task=index % 3, start=index) for index, length in enumerate(lengths)]
    batch = pack(rows, 0, cutoff)
    assert batch["input_ids"].shape[1] <= cutoff
    found = []
    for sequence in range(len(batch["input_ids"])):
        tasks = batch["task_id"][sequence].tolist()
        starts = [
            at
            for at, position in enumerate(batch["position_ids"][sequence])
            if position == 0 and tasks[at] >= 0
        ]
        length = sum(task >= 0 for task in tasks)
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            ids = batch["input_ids"][sequence, start:end].tolist()
            labels = batch["labels"][sequence, start:end].tolist()
            assert labels[0] == IGNORED
            assert len(set(tasks[start:end])) == 1
            found.append((ids, [IGNORED, *labels[1:]], tasks[start]))
            mask = batch["attention_mask"][sequence, 0, start:end]
            assert torch.equal(mask[:, start:end], torch.ones(end - start, end - start).tril().bool())
            assert not mask[:, :start].any()
            assert not mask[:, end:].any()
        assert (batch["labels"][sequence, length:] == IGNORED).all()
    expected = [(one["input_ids"], [IGNORED, *one["labels"][1:]], one["task_id"]) for one in rows]
    assert sorted(found) == sorted(expected)
    assert batch["attention_mask"].any(-1).all(), "a query that may look nowhere gives NaN"


@pytest.mark.parametrize(
    ("lengths", "cutoff", "shape"),
    [
        ([17] * 16, 256, (2, 136)),  # 272 tokens: filling the first sequence would pad the second to 255
        ([30, 20, 10, 10, 10], 96, (1, 80)),
        ([40, 9, 8, 7], 45, (2, 40)),
        ([20, 20, 20], 20, (3, 20)),
        ([5], 96, (1, 5)),
    ],
)
def test_packed_sequences_are_few_and_short(lengths, cutoff, shape):
    batch = pack([row(length) for length in lengths], 0, cutoff)
    assert batch["input_ids"].shape == shape


def token_losses(model, batch):
    """Cross entropy of every next token in float64 (transformers' own loss is float32), 0 where none is asked for."""
    given = {name: value for name, value in batch.items() if name not in ("task_id", "labels")}
    logits, labels = model(**given).logits[:, :-1], batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
    )


def test_packed_loss_and_gradients_equal_those_of_the_padded_batch():
    rows = [row(length, start=length) for length in (5, 9, 3, 7, 4)]
    results = []
    for packing, sequences in ((False, 5), (True, 2)):
        model = llama()
        batch = Collator(0, packing=packing, cutoff=16)(rows)
        assert len(batch["input_ids"]) == sequences
        loss = token_losses(model, batch).sum() / (batch["labels"] != IGNORED).sum()
        loss.backward()
        results.append((loss.item(), [parameter.grad for parameter in model.parameters()]))
    (padded, padded_grads), (packed, packed_grads) = results
    assert packed == pytest.approx(padded, abs=1e-10)
    for one, other in zip(padded_grads, packed_grads, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-10)


def test_the_task_of_every_packed_token_gives_the_loss_of_every_task():
    rows = [row(5, task=0), row(9, task=1), row(3, task=1)]
    model = llama()
    sums = []
    for packing in (False, True):
        batch = Collator(0, packing=packing, cutoff=32)(rows)
        losses, task_id = token_losses(model, batch), batch["task_id"]
        owner = task_id[:, 1:] if packing else task_id[:, None].expand_as(losses)
        sums.append([losses[owner == task].sum().item() for task in (0, 1)])
    assert sums[1] == pytest.approx(sums[0], abs=1e-10)


def test_check_packing_accepts_sdpa_and_restores_the_mode():
    model = llama().train()
    check_packing(model, 256)
    assert model.training


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"attn_implementation": "eager"},
            r"eager attention does not keep .* change by .* with the row before it",
        ),
    ],
)
def test_check_packing_refuses_attention_that_mixes_rows(options, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        check_packing(llama(**options), 256)
    assert "prompt.packing=false, or model.attention=sdpa" in str(refused.value)


@pytest.mark.parametrize(
    ("model_class", "options", "window"),
    [
        ("MistralForCausalLM", {"sliding_window": 8}, "sliding_window"),
        ("Gemma3ForCausalLM", {"sliding_window": 8, "head_dim": 8}, "sliding_window"),
        ("Llama4ForCausalLM", {"attention_chunk_size": 8, "num_local_experts": 2}, "attention_chunk_size"),
    ],
)
def test_check_packing_refuses_rows_longer_than_the_window(model_class, options, window):
    import transformers

    model_type = getattr(transformers, model_class)
    config = model_type.config_class(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, **options,
    )  # fmt: skip
    model = model_type(config)
    with pytest.raises(
        ConfigError, match=rf"8 tokens only \({window}\).* prompt.cutoff is 9. Set prompt.cutoff=8"
    ):
        check_packing(model, 9)
    if window == "sliding_window":
        check_packing(model, 8)


def test_check_packing_refuses_a_model_without_attention_masks():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="the packed forward failed"):
        check_packing(model, 256)
