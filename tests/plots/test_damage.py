import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from kclib import plots
from kclib.datasets import ImageSet

LAYERS = pd.DataFrame(
    [("a", "alone", 5.0, 4.0, 7.0), ("a", "all but", 20.0, 18, 21), ("b", "alone", -1.0, -2, 0),
     ("b", "all but", 6.0, 5, 7), ("all layers", "all", 26.0, 24, 28)],
    columns=["layer", "way", "drop", "drop_low", "drop_high"],
)  # fmt: skip
CLUSTERS = pd.DataFrame({"share": [0.5, 0.3, 0.2]})
CLASSES = pd.DataFrame(
    {"name": ["cat", "dog"], "before": [90, 80], "after": [50, 85], "lost": [9, 1], "won": [1, 2]}
)
FLIPS = pd.DataFrame(
    [("cat", "cat", "dog", "lost"), ("dog", "cat", "dog", "won"), ("cat", "dog", "owl", "wrong")],
    columns=["label", "before", "after", "way"],
)  # fmt: skip
IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
DRAW = {
    "by_layer": lambda ax: plots.damage_by_layer(LAYERS, ax=ax),
    "by_cluster": lambda ax: plots.damage_by_cluster(CLUSTERS, ax=ax),
    "by_class": lambda ax: plots.damage_by_class(CLASSES, ax=ax),
    "flipped": lambda ax: plots.flipped_images(IMAGES, FLIPS, ax=ax),
}


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_figure_is_drawn_on_the_axes_given(draw):
    _, (ax, current) = plt.subplots(1, 2)
    plt.sca(current)
    assert draw(ax) is ax
    assert ax.has_data()
    assert not current.has_data()
    assert draw(None) is current
    current.figure.canvas.draw()


def test_bars_of_a_layer_stand_side_by_side_with_their_intervals():
    ax = DRAW["by_layer"](None)
    alone, rest = (x for x in ax.containers if hasattr(x, "patches"))
    assert [bar.get_height() for bar in alone] == [5, -1]
    assert [bar.get_height() for bar in rest] == [20, 6]
    assert [bar.get_x() + bar.get_width() for bar in alone] == pytest.approx([bar.get_x() for bar in rest])
    (whiskers,) = alone.errorbar.lines[2]
    assert [segment[:, 1].tolist() for segment in whiskers.get_segments()] == [[4, 7], [-2, 0]]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b"]
    assert "all are: 26.00 points" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_damage_adds_up_from_the_worst_cluster_to_all():
    line = DRAW["by_cluster"](None).lines[0]
    np.testing.assert_allclose(line.get_xydata(), [(0, 0), (1, 50), (2, 80), (3, 100)])


def test_dumbbells_join_before_and_after_in_the_order_of_the_table():
    ax = DRAW["by_class"](None)
    bars, before, after = ax.collections
    np.testing.assert_array_equal(before.get_offsets(), [(90, 0), (80, 1)])
    np.testing.assert_array_equal(after.get_offsets(), [(50, 0), (85, 1)])
    assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [[90, 50], [80, 85]]
    assert [text.get_text() for text in ax.texts] == ["9 lost, 1 won", "1 lost, 2 won"]
    assert ax.yaxis_inverted()


def test_flipped_images_stand_over_the_truth_and_both_answers():
    ax = plots.flipped_images(IMAGES, FLIPS, columns=2, ax=plt.figure().gca())
    sheet = np.asarray(ax.images[0].get_array())
    deep, wide = sheet.shape[0] // 2, sheet.shape[1] // 2
    for image, (top, left) in zip(IMAGES, [(0, 0), (0, wide), (deep, 0)], strict=True):
        np.testing.assert_array_equal(sheet[top : top + 4, left : left + 5], image)
    assert (sheet == 255).sum() == sheet.size - IMAGES.size
    assert [text.get_text() for text in ax.texts] == ["cat\ncat → dog", "dog\ncat → dog", "cat\ndog → owl"]
    assert len({text.get_color() for text in ax.texts}) == 3
    coloured = plots.flipped_images(np.zeros((3, 4, 5, 3), np.uint8), FLIPS, ax=plt.figure().gca())
    assert coloured.images[0].get_array().shape[2] == 3


@pytest.mark.parametrize("in_memory", [True, False])
def test_flipped_images_are_found_in_their_data_set_whatever_it_holds(in_memory):
    pixels = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pairs = [(Image.fromarray(x.permute(1, 2, 0).numpy()), 0) for x in pixels]
    data = ImageSet("made up", pixels if in_memory else pairs, torch.zeros(5).long(), ("a",), "")
    ax = plots.flipped_images(data, FLIPS.assign(image=[4, 0, 2]), ax=plt.figure().gca())
    sheet = np.asarray(ax.images[0].get_array())
    for place, image in enumerate((4, 0, 2)):
        drawn = sheet[:4, place * 8 :][:, :6]
        np.testing.assert_array_equal(drawn, pixels[image].permute(1, 2, 0))


def test_photographs_of_several_sizes_and_long_names_keep_to_their_places():
    photographs = [(Image.new("RGB", size, "black"), 0) for size in ((400, 200), (30, 90), (8, 8))]
    data = ImageSet("made up", photographs, torch.zeros(3).long(), ("a",), "")
    table = FLIPS.assign(image=[0, 1, 2], label="Chesapeake Bay retriever")
    ax = plots.flipped_images(data, table, ax=plt.figure().gca())
    assert ax.images[0].get_array().shape == (144, 8 * 98, 3)
    assert {text.get_text().splitlines()[0] for text in ax.texts} == {"Chesapeake B…"}


def test_no_flipped_image_is_a_sentence():
    ax = plots.flipped_images(IMAGES[:0], FLIPS[:0], ax=plt.figure().gca())
    assert "no image" in ax.texts[0].get_text()
