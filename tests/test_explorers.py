import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from kclib import clustering, explorers, kmeans
from kclib.errors import InvalidValueError
from kclib.explorers import ALL_LAYERS, ClusterExplorer
from kclib.kernels import extract


@pytest.fixture
def bank():
    torch.manual_seed(0)
    return extract(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)))


@pytest.fixture
def calls(monkeypatch):
    """The K of each clustering made."""
    made, at = [], kmeans.Ladder.at

    def counted(self, n_clusters):
        made.append(n_clusters)
        return at(self, n_clusters)

    monkeypatch.setattr(kmeans.Ladder, "at", counted)
    return made


@pytest.fixture
def shown(monkeypatch):
    """The titles of the figures made, in order."""
    titles, figure = [], ClusterExplorer.figure

    def recorded(self, choice, n_clusters):
        made = figure(self, choice, n_clusters)
        titles.append(made.get_suptitle())
        return made

    monkeypatch.setattr(ClusterExplorer, "figure", recorded)
    return titles


def controls(view):
    choice, count, status = view.children[0].children
    return choice, count, status, view.children[1]


def test_choices_are_all_layers_and_each_with_its_own_largest_k(bank):
    explorer = ClusterExplorer(bank)
    assert {choice: explorer.largest(choice) for choice in explorer.choices} == {
        ALL_LAYERS: 152,
        "0": 24,
        "1": 128,
    }
    with pytest.raises(InvalidValueError, match="no layer 'conv9'"):
        explorer.largest("conv9")


@pytest.mark.parametrize("choice", ["1", ALL_LAYERS])
def test_figure_shows_the_clustering_of_the_choice(bank, choice):
    chosen = bank if choice == ALL_LAYERS else bank.only(choice)
    rungs = [k for k in explorers.RUNGS if k <= len(chosen)]
    expected = clustering.of_all(chosen, kmeans.ladder(chosen.points, rungs, tol=0.01, seed=5).at(20), 5)
    fig = ClusterExplorer(bank, seed=5, shown=12).figure(choice, 20)
    n = expected.n_kernels
    title = f"{choice}: {n} kernels, K = 20, {100 - 2000 / n:.3f} % removed, inertia {expected.inertia:.4g}"
    assert fig.get_suptitle() == title
    left, right = fig.axes
    assert left.get_title() == "the 12 most used of 20 representatives"
    codebook, counts = clustering.by_use(expected.groups[0])
    assert [int(text.get_text()) for text in left.texts] == counts[:12].tolist()
    first = np.ma.filled(left.images[0].get_array(), np.nan)[:3, :3]
    np.testing.assert_allclose(first, codebook[0] / np.abs(codebook[0]).max())
    assert right.lines[0].get_ydata().tolist() == counts.tolist()


def test_k_above_the_largest_keeps_every_kernel(bank, calls):
    fig = ClusterExplorer(bank).figure("0", 4096)
    assert calls == [24]
    assert "K = 24, 0.000 % removed, inertia 0" in fig.get_suptitle()
    assert fig.axes[0].get_title() == "the 24 most used of 24 representatives"


def test_what_was_clustered_once_is_not_clustered_again(bank, calls):
    explorer = ClusterExplorer(bank)
    first, again = (explorer.figure("1", 8) for _ in range(2))
    assert calls == [8]
    assert first is not again
    assert first.get_suptitle() == again.get_suptitle()
    explorer.figure("1", 16)
    explorer.figure("0", 8)
    explorer.figure("0", 100)
    explorer.figure("0", 200)
    assert calls == [8, 16, 8, 24]


def test_view_opens_on_a_layer_with_its_picture(bank, shown):
    choice, count, status, picture = controls(explorers.cluster_explorer(ClusterExplorer(bank), n_clusters=8))
    assert (choice.value, choice.options, count.value) == ("0", (ALL_LAYERS, "0", "1"), 8)
    assert bytes(picture.value).startswith(b"\x89PNG")
    assert status.value == ""
    assert [title.split(",")[:2] for title in shown] == [["0: 24 kernels", " K = 8"]]


def test_the_view_makes_no_output_area_which_could_make_a_batch_wait_for_ever(bank, monkeypatch):
    made = []
    monkeypatch.setattr(widgets, "Output", lambda *_, **__: made.append(1) or widgets.Label())
    _, count, _, _ = controls(explorers.cluster_explorer(ClusterExplorer(bank)))
    count.value = 2
    assert made == []


def test_moving_the_slider_or_choosing_a_layer_redraws(bank, shown):
    choice, count, _, picture = controls(explorers.cluster_explorer(ClusterExplorer(bank), n_clusters=8))
    pictures = [picture.value]
    for control, value in ((count, 16), (choice, "1"), (choice, ALL_LAYERS)):
        control.value = value
        pictures.append(picture.value)
    assert len(set(pictures)) == 4
    assert [title.split(":")[0] for title in shown] == ["0", "0", "1", ALL_LAYERS]
    assert [title.split(",")[-3] for title in shown] == [" K = 8", " K = 16", " K = 16", " K = 16"]


def test_view_says_that_it_clusters_and_leaves_no_figure_open(bank):
    _, count, status, _ = controls(explorers.cluster_explorer(ClusterExplorer(bank)))
    said = []
    status.observe(lambda change: said.append(change.new), "value")
    assert not count.continuous_update
    count.value = 2
    assert said == ["clustering …", ""]
    assert plt.get_fignums() == []


def test_the_first_clustering_of_a_choice_says_how_far_it_is(bank):
    choice, _, status, _ = controls(explorers.cluster_explorer(ClusterExplorer(bank)))
    said = []
    status.observe(lambda change: said.append(change.new), "value")
    choice.value = ALL_LAYERS
    shares = [int(text.split()[-1].rstrip("%")) for text in said if "%" in text]
    assert shares == sorted(shares)
    assert (len(shares) > 2, shares[-1]) == (True, 100)
    assert (said[0], said[-1]) == ("clustering …", "")


def test_a_k_that_is_no_power_of_two_is_on_the_slider_too(bank):
    _, count, _, _ = controls(explorers.cluster_explorer(ClusterExplorer(bank), n_clusters=100))
    assert count.value == 100
    assert [k for _, k in count.options] == sorted({100, *(2**power for power in range(1, 15))})


def test_slider_labels_say_their_values(bank):
    _, count, _, _ = controls(explorers.cluster_explorer(ClusterExplorer(bank)))
    assert [int(label.replace(",", "")) for label, _ in count.options] == [k for _, k in count.options]
