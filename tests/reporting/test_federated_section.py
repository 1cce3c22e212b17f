"""A federation's figures and page."""

import numpy as np
import pytest
from document import Document
from federations import federation, write_federation

from braidlora.errors import CheckpointError
from braidlora.reporting.federated_plots import federated_plots
from braidlora.reporting.federated_sections import (
    federated_headline,
    federated_sections,
    read_federation,
)
from braidlora.reporting.page import write_report


def plots(federated):
    return {plot.name: plot for plot in federated_plots(federated)}


def test_every_client_has_a_panel_with_its_scores_round_by_round():
    given = federation(clients=3, rounds=4)
    panels = plots(given)["client-scores"].figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == list(given["partition"])
    for panel, name in zip(panels, given["partition"], strict=True):
        drawn = [line.get_ydata() for line in panel.lines]
        expected = [
            [line["clients"][name][s] for line in given["rounds"]] for s in ("before", "after", "aggregated")
        ]
        np.testing.assert_allclose(drawn, expected)


def test_of_many_clients_the_worst_are_shown():
    given = federation(clients=30, rounds=2)
    plot = plots(given)["client-scores"]
    final = {name: one["mean"] for name, one in given["metrics"]["clients"].items()}
    worst = sorted(final, key=final.get)[:20]
    assert [panel.get_title(loc="left") for panel in plot.figure.axes] == worst
    assert "the 20 clients with the lowest final scores" in plot.caption


def test_spread_and_bytes_follow_the_rounds():
    given = federation(clients=12, rounds=3, asked=5)
    found = plots(given)
    aggregated = found["client-spread"].figure.axes[2]
    means = [line["means"]["aggregated"] for line in given["rounds"]]
    np.testing.assert_allclose(aggregated.lines[0].get_ydata(), means)
    sent = found["bytes"].figure.axes[0].lines[2]
    np.testing.assert_allclose(sent.get_xdata(), np.cumsum([5 * 110_000] * 3) / 1e6)
    np.testing.assert_allclose(sent.get_ydata(), means)


@pytest.mark.parametrize(("clients", "lines"), [(4, 4), (12, 1)])
def test_losses_are_one_line_per_client_or_their_mean(clients, lines):
    given = federation(clients, rounds=3)
    axes = plots(given)["client-losses"].figure.axes[0]
    assert len(axes.lines) == lines
    if lines == 1:
        means = [np.mean([one["loss"] for one in line["clients"].values()]) for line in given["rounds"]]
        np.testing.assert_allclose(axes.lines[0].get_ydata(), means)


def test_the_partition_shows_labels_where_they_are_known_and_tasks_otherwise():
    given = federation(clients=3)
    plot = plots(given)["partition"]
    expected = [list(one["tasks"]["mood"]["train"]["values"].values()) for one in given["partition"].values()]
    np.testing.assert_array_equal(plot.figure.axes[0].images[0].get_array(), expected)
    free = federation(clients=3, labels=None)
    axes = plots(free)["partition"].figure.axes[0]
    rows = [[one["tasks"]["mood"]["train"]["rows"]] for one in free["partition"].values()]
    np.testing.assert_array_equal(axes.images[0].get_array(), rows)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["mood"]


def test_without_test_rows_there_are_losses_and_partition_alone():
    given = federation(scored=False)
    assert set(plots(given)) == {"client-losses", "partition"}
    assert federated_headline(given).verdict == ["No client has test rows, so nothing was scored."]


def test_what_averaging_changed_is_said_of_the_clients_that_trained():
    given = federation(clients=12, rounds=3, asked=5)
    trained = [one for one in given["rounds"][-1]["clients"].values() if "after" in one]
    change = np.mean([one["aggregated"] - one["after"] for one in trained])
    assert f"5 clients that trained by {change:+.1f} on average" in " ".join(
        federated_headline(given).verdict
    )


def test_skipped_rounds_and_failures_are_told():
    given = federation(clients=3)
    given["metrics"]["skipped"] = [2, 4]
    given["rounds"][1]["failed"] = {"client-02": {"why": ["out of memory", "gone"], "left_out": True}}
    rounds = federated_sections(given)[1]
    assert rounds.text == ["Rounds with too few clients, in which nothing was aggregated: 2, 4."]
    [row] = rounds.tables[0].rows
    assert row.name == "Round 2"
    assert row.cells == ["client-02", "left out", "out of memory\ngone"]


def test_the_page_of_a_federation_is_sound(tmp_path):
    write_federation(tmp_path / "run", federation(clients=9, rounds=3, asked=4))
    path = write_report(
        tmp_path, None, federated=read_federation(tmp_path / "run", "braidlora federate x.yaml")
    )
    page = Document(path)
    ids = page.ids()
    assert len(set(ids)) == len(ids)
    assert len(page.all("svg")) == 5
    assert "braidlora federate x.yaml" in page.texts["code"]
    assert not page.all("script")


def test_a_folder_that_is_no_federation_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.yaml: missing\. Is this the right directory"):
        read_federation(tmp_path, "")
    write_federation(tmp_path / "run", federation(clients=2))
    (tmp_path / "run" / "rounds.jsonl").write_text('{"round"')
    with pytest.raises(CheckpointError, match=r"rounds\.jsonl:1: .*damaged"):
        read_federation(tmp_path / "run", "")
