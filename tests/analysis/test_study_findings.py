"""The words follow from the numbers, also where the paper's findings do not hold."""

import pytest

from braidlora.analysis.findings import findings

SEED, TASK, BOTH = "different_tasks_same_seed", "same_task_different_seeds", "different_tasks_different_seeds"


def study(A=(0.97, 0.13, 0.12), B=(0.3, 0.5, 0.2), since_start=0.05, A_turn=0.04, B_turn=0.8):
    def groups(values):
        return {
            group: {"mean": value, "std": 0.01}
            for group, value in zip((SEED, TASK, BOTH), values, strict=True)
        }

    def turned(value):
        return {"direction": {"mean": value, "std": 0.02}}

    return {
        "start": {"A": {"groups": groups((1.0, 0.12, 0.12))}},
        "end": {"A": {"chance": 0.125, "groups": groups(A)}, "B": {"chance": 0.125, "groups": groups(B)}},
        "drift": {
            "since_start": {"A": turned(since_start)},
            "since_warmup": {
                "from": "step-9",
                "A": turned(A_turn),
                "B": turned(B_turn),
                "delta": turned(0.7),
            },
        },
    }


@pytest.mark.parametrize(
    ("A", "finding", "words"),
    [
        ((0.97, 0.13, 0.12), "holds", "similar only because they start from the same values"),
        ((0.97, 0.45, 0.12), "holds in part", "A matrices from different seeds are also closer than chance"),
        ((0.40, 0.13, 0.12), "holds in part", "training has moved A far from it"),
        ((0.15, 0.13, 0.12), "does not hold", "makes little difference"),
        ((0.90, 0.92, 0.88), "does not hold", "makes little difference"),
    ],
)
def test_alike_by_seed(A, finding, words):
    found = findings(study(A=A))["alike_by_seed"]
    assert found["finding"] == finding
    assert f"only if they share a seed: {finding}." in found["text"]
    assert words in found["text"]
    for number in A:
        assert f"{number:.3f} ± 0.010" in found["text"]
    assert "chance: 0.125" in found["text"]


def test_a_rank_as_large_as_the_width_leaves_nothing_to_tell():
    full = study(A=(1.0, 1.0, 1.0))
    full["end"]["A"]["chance"] = 1.0
    thin = study()
    thin["end"]["A"]["groups"][SEED] = None
    for given in (full, thin):
        found = findings(given)["alike_by_seed"]
        assert found["finding"] == "unknown"
        assert "Try a smaller adapter.r" in found["text"]


@pytest.mark.parametrize(
    ("since_start", "A_turn", "B_turn", "finding", "words"),
    [
        (
            0.05,
            0.04,
            0.8,
            "holds",
            "A hardly changes direction, and after the same checkpoint B changes 20.0 times as much",
        ),
        (
            0.05,
            0.04,
            0.06,
            "holds in part",
            "A hardly changes direction, and after the same checkpoint B changes 1.5 times",
        ),
        (0.30, 0.25, 0.8, "holds in part", "A changes direction noticeably"),
        (0.30, 0.25, 0.2, "does not hold", "B changes 0.8 times as much"),
        (0.0, 0.0, 0.8, "holds", "only B changes"),
    ],
)
def test_b_takes_the_direction(since_start, A_turn, B_turn, finding, words):
    found = findings(study(since_start=since_start, A_turn=A_turn, B_turn=B_turn))["b_takes_the_direction"]
    assert found["finding"] == finding
    assert words in found["text"]


def test_without_a_checkpoint_after_warm_up():
    made = study()
    made["drift"] = {"since_start": None, "since_warmup": None, "reasons": {"since_warmup": "no checkpoint"}}
    found = findings(made)["b_takes_the_direction"]
    assert found["finding"] == "unknown"
    assert "no checkpoint" in found["text"]


def test_while_one_factor_is_zero():
    made = study()
    made["drift"]["since_warmup"]["B"] = {"direction": None}
    found = findings(made)["b_takes_the_direction"]
    assert found["finding"] == "unknown"
    assert "still zero in step-9" in found["text"]


def test_without_a_subspace():
    made = study()
    made["end"]["B"]["groups"][TASK] = None
    assert "no subspace of full rank" in findings(made)["alike_by_seed"]["text"]
