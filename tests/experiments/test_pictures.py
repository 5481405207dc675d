from matplotlib.figure import Figure

from kclib.experiments import _pictures


def test_a_figure_is_described_by_its_titles_and_axes():
    figure = Figure()
    figure.suptitle("two\nlayers")
    left, right, empty, _ = figure.subplots(2, 2).flat
    left.set(title="the first", xlabel="K", ylabel="drop (points)")
    right.set(ylabel="kernels")
    empty.set_title("the first")
    assert _pictures.described(figure) == "two layers; the first: drop (points) against K; kernels; the first"


def test_what_axes_share_is_said_once():
    figure = Figure()
    for ax in figure.subplots(3):
        ax.set(xlabel="K", ylabel="bytes")
    assert _pictures.described(figure) == "bytes against K"
    assert _pictures.described(Figure()) == ""
