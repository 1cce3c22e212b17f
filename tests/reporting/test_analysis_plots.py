"""A figure for every section of an analysis, with its words in the SVG and what is missing left blank."""

import copy

import pytest
from analyses import ANALYSIS, LAYERS, drift, similarity

from braidlora.reporting.analysis_plots import analysis_plots
from braidlora.reporting.layer_axes import short_names, slug


def svg_of(plot, folder):
    """The words and shapes of a figure."""
    return plot.save(folder)[1].read_text(encoding="utf-8")


def test_every_section_has_its_plots(tmp_path):
    plots = {plot.name: plot for plot in analysis_plots(ANALYSIS)}
    assert list(plots) == [
        "similarity", "similarity-layers", "drift-runs-mine", "routers-runs-mine", "gradients-runs-mine",
        "gradients-layers-runs-mine",
    ]  # fmt: skip
    for plot in plots.values():
        assert plot.caption.endswith(".")
    words = {
        "similarity": ("row spaces of A", "adapter 2", "0.20"),
        "similarity-layers": ("chance", ">q<", ">v<", "layer"),
        "drift-runs-mine": ("A since start", "ΔW since step 4", "relative to before"),
        "routers-runs-mine": ("expert 2", "1 v", "other", "0.90"),
        "gradients-runs-mine": ("B (shared)", "-0.20", "norm of the gradient"),
        "gradients-layers-runs-mine": ("within a task",),
    }
    for name, expected in words.items():
        svg = svg_of(plots[name], tmp_path)
        for word in expected:
            assert word in svg, f"{name}: {word}"
    assert "A (shared)" not in svg_of(plots["gradients-runs-mine"], tmp_path)


def test_the_caption_says_the_numbers():
    plots = {plot.name: plot.caption for plot in analysis_plots(ANALYSIS)}
    assert "0.200 between pairs on average, chance 0.100" in plots["similarity"]
    assert "B since step-4: 0.200" in plots["drift-runs-mine"]
    assert "In 2 of 4 layers" in plots["routers-runs-mine"]
    assert "B: -0.20 between tasks, 0.55 within one" in plots["gradients-runs-mine"]


def test_what_is_missing_is_left_out(tmp_path):
    assert analysis_plots({"similarity": None, "drift": {}}) == []
    without_B = copy.deepcopy(ANALYSIS)
    without_B["similarity"]["B"]["pairs"]["similarity"] = None
    svg = svg_of(analysis_plots(without_B)[0], tmp_path)
    assert "row spaces of A" in svg
    assert "column spaces of B" not in svg
    untrained = copy.deepcopy(ANALYSIS["drift"]["runs/mine"])
    untrained["changes"] = []
    assert analysis_plots({"drift": {"x": untrained}}) == []


@pytest.mark.parametrize("size", [2, 14])
def test_small_and_large_matrices(size, tmp_path):
    svg = svg_of(analysis_plots({"similarity": similarity(size)})[0], tmp_path)
    assert ("0.20<" in svg) == (size == 2)  # the numbers of a large one would not be readable


def test_names():
    assert short_names(["self_attn.q_proj", "mlp.up_proj"]) == {
        "self_attn.q_proj": "q_proj",
        "mlp.up_proj": "up_proj",
    }
    assert short_names(["attention.output.dense", "output.dense"]) == {
        "attention.output.dense": "attention.output.dense",
        "output.dense": "output.dense",
    }
    assert slug("runs/x #1") == "runs-x-1"
    assert slug("läufe/実験_1") == "läufe-実験_1"


def test_labels_that_look_alike_keep_figures_of_their_own():
    plots = analysis_plots({"drift": {"a b": drift(), "a-b": drift(), "a/b": drift()}})
    assert [plot.name for plot in plots] == ["drift-a-b", "drift-a-b-2", "drift-a-b-3"]


@pytest.mark.parametrize(("tasks", "experts"), [(3, 3), (20, 3), (20, 8)])
def test_a_router_figure_of_many_tasks_grows_downwards(tasks, experts):
    names = [f"task_{number}" for number in range(tasks)]
    weights = [[1 / experts] * experts] * tasks
    given = {
        "tasks": names, "experts": experts, "mean": {"distance": 0.1, "layers_where_tasks_differ": 1},
        "layers": [{**layer, "weights": weights} for layer in LAYERS],
    }  # fmt: skip
    [plot] = analysis_plots({"routers": {"x": given}})
    assert plot.figure.get_figwidth() <= 12
    shown = [title for ax in plot.figure.axes if (title := ax.get_title(loc="left"))]
    assert shown == [f"expert {number + 1}" for number in range(experts)]
