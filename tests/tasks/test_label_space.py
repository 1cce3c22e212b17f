"""The union of the tasks' labels, and the mask that keeps a task to its own."""

from __future__ import annotations

import pytest
import torch
from task_helpers import config_of

from braidlora.errors import CheckpointError, DataError
from braidlora.tasks import LabelSpace, load_tasks

SPACE = LabelSpace(
    {"mood": ["negative", "positive"], "grade": ["negative", "neutral", "positive"], "topic": ["x"]}
)


def test_the_union_keeps_a_shared_name_once():
    assert SPACE.names == ["negative", "positive", "neutral", "x"]
    assert SPACE.id2label == {0: "negative", 1: "positive", 2: "neutral", 3: "x"}
    assert SPACE.label2id["neutral"] == SPACE.index("neutral") == 2
    assert SPACE.mask.tolist() == [
        [True, True, False, False],
        [True, True, True, False],
        [False, False, False, True],
    ]
    with pytest.raises(DataError, match="unknown label 'y'; known are negative, positive, neutral, x"):
        SPACE.index("y")


def test_masked_logits_give_other_tasks_labels_no_probability_and_no_gradient():
    logits = torch.tensor([[1.0, 2.0, 9.0, 9.0], [1.0, 2.0, 3.0, 9.0]], requires_grad=True)
    task_id = torch.tensor([0, 1])
    masked = SPACE.masked(logits, task_id)
    assert masked.argmax(-1).tolist() == [1, 2]
    assert masked.softmax(-1)[0].tolist()[2:] == [0.0, 0.0]
    torch.nn.functional.cross_entropy(masked, torch.tensor([1, 0])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 2:].tolist() == [0.0, 0.0]
    assert logits.grad[1, 3].item() == 0.0
    assert torch.isfinite(logits.grad).all()


def test_it_is_saved_and_loaded_as_json():
    loaded = LabelSpace.parse("labels.json", SPACE.to_json().encode())
    assert loaded == SPACE
    assert loaded.names == SPACE.names
    assert torch.equal(loaded.mask, SPACE.mask)
    assert loaded != LabelSpace({"mood": ["negative", "positive"]})


@pytest.mark.parametrize("text", ["", "[]", '{"tasks": {"a": "b"}}', '{"tasks": 3}', '{"labels": {}}'])
def test_a_damaged_file_is_a_checkpoint_error(text):
    with pytest.raises(CheckpointError, match=r"labels\.json: not a label space"):
        LabelSpace.parse("labels.json", text.encode())


def test_a_task_with_one_label_is_refused(rows_file):
    tasks = load_tasks(config_of(rows_file([{"text": "x", "label": "only"}]), task={"kind": "classify"}))
    with pytest.raises(DataError, match=r"task t: .*at least two labels, got \['only'\]"):
        LabelSpace.of(tasks)
