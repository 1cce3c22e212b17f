"""A plot gives the same bytes each time, as PNG and as SVG."""

from braidlora.reporting.plot import COLORS, Plot, new_figure


def line() -> Plot:
    figure, axes = new_figure(3, 2)
    axes.plot([0, 1, 2], [1.0, 0.5, 0.25], color=COLORS[0])
    return Plot("loss", "Loss", "The loss halves at every step.", figure)


def test_a_plot_is_written_as_png_and_svg_and_twice_the_same(tmp_path):
    paths = line().save(tmp_path / "one")
    again = line().save(tmp_path / "two")
    assert [path.name for path in paths] == ["loss.png", "loss.svg"]
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]


def test_several_axes_come_as_an_array():
    _, axes = new_figure(4, 2, 1, 2, sharey=True)
    assert axes.shape == (2,)
