"""The JSON of an analysis with every section."""

import copy

LAYERS = [{"name": f"layers.{i}.attn.{m}", "layer": i, "module": f"attn.{m}"} for i in (0, 1) for m in "qv"]


def similarity(size):
    matrix = [[1.0 if i == j else 0.2 for j in range(size)] for i in range(size)]
    chance = [[0.1] * size for _ in range(size)]
    found = {
        "elements": [f"adapter {i}" for i in range(size)], "mean": matrix, "chance": chance,
        "pairs": {"similarity": 0.2, "chance": 0.1},
        "layers": [{**layer, "similarity": matrix, "chance": chance} for layer in LAYERS],
    }  # fmt: skip
    return {"left_out": {}, "A": found, "B": copy.deepcopy(found)}


def drift():
    cell = {"magnitude": 0.5, "direction": 0.2, "similarity": 0.8, "chance": 0.1}
    none = {**dict.fromkeys(cell), "reason": "B is zero"}
    since_start = {"A": cell, "B": none, "delta": none}
    since_warmup = dict.fromkeys(("A", "B", "delta"), cell)
    return {
        "stages": ["adapter_init", "step-4", "adapter"],
        "changes": [
            {
                "from": start, "to": "adapter", "mean": cells,
                "layers": [{**layer, **{f: [c, c] for f, c in cells.items()}} for layer in LAYERS],
            }
            for start, cells in (("adapter_init", since_start), ("step-4", since_warmup))
        ],
    }  # fmt: skip


def routers():
    return {
        "tasks": ["one", "other"], "experts": 2,
        "mean": {"distance": 0.3, "layers_where_tasks_differ": 2},
        "layers": [{**layer, "weights": [[0.9, 0.1], [0.4, 0.6]]} for layer in LAYERS],
    }  # fmt: skip


def gradients():
    cosine = [[0.5, -0.2], [-0.2, 0.6]]
    entry = {"cosine": cosine, "norm": [1.0, 2.0], "between": -0.2, "within": 0.55}
    nothing = {"cosine": [[None] * 2] * 2, "norm": [0.0, 0.0], "between": None, "within": None}
    return {
        "of": "task", "tasks": ["one", "other"], "shared": ["B"],
        "factors": {
            "A": {**nothing, "layers": [{**layer, **nothing} for layer in LAYERS]},
            "B": {**entry, "layers": [{**layer, **entry} for layer in LAYERS]},
        },
    }  # fmt: skip


ANALYSIS = {
    "similarity": similarity(3),
    "drift": {"runs/mine": drift()},
    "routers": {"runs/mine": routers(), "plain": None},
    "gradients": {"runs/mine": gradients()},
}
