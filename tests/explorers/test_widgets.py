import base64
import math
import re
import threading
from collections import OrderedDict

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from gates import PATIENCE, Gate, Through
from ipywidgets import embed
from torch import nn

import kclib
from kclib import clustering, kernels
from kclib.clustering._clustering import quantized
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError
from kclib.explorers import (
    ClusterExplorer,
    MapExplorer,
    SimilarityExplorer,
    _cluster_explorer,
    _controls,
    _details,
)
from kclib.explorers import widgets as explorers_widgets
from kclib.explorers._clusterer import COLOURS as COLOURINGS
from kclib.explorers._clusterer import METHODS, SCOPES
from kclib.explorers._map_explorer import COLOURS
from kclib.explorers.widgets import clusters, maps
from kclib.models import Model
from kclib.similarity import distances
from kclib.similarity.embedding import Graph
from kclib.store import Store

NOTHING = "<span role='status'>&nbsp;</span>"

pytestmark = pytest.mark.usefixtures("one_thread")


def network(call=lambda: None, names=("one", "two")):
    """Two layers of 12 and 24 kernels."""
    torch.manual_seed(0)
    layers = {
        names[0]: nn.Conv2d(3, 4, 3), "relu": nn.ReLU(), names[1]: nn.Conv2d(4, 6, 3),
        "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "through": Through(lambda: call()),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(layers)).eval()


def model(*args):
    return Model("tiny", network(*args), lambda images: images.float() / 255 - 0.5)


def images():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (70, 3, 8, 8), dtype=torch.uint8, generator=draw)
    return ImageSet("tiny/test", pixels, torch.arange(70) % 6, tuple("abcdef"), "0")


def similarity_explorer():
    bank = kernels.extract(network())
    return SimilarityExplorer(bank, np.arange(len(bank)), n_bins=5)


def map_explorer():
    bank = kernels.extract(network())
    places = np.random.default_rng(0).normal(size=(len(bank), 2)).astype(np.float32)
    none = np.empty((len(bank), 0), np.int32)
    graphs = {kind: Graph(kind, bank.points, none, none.astype(np.float32)) for kind in ("unit", "raw")}
    return MapExplorer(bank, np.arange(len(bank)), graphs, {"unit": places, "raw": places[::-1]})


def plain_explorer():
    return ClusterExplorer(model(), n_clusters=8)


def cluster_explorer_with_images():
    return ClusterExplorer(model(), images(), n_clusters=8)


VIEWS = {
    "similarity": (explorers_widgets.similarity, similarity_explorer),
    "map": (maps, map_explorer),
    "clusters": (clusters, plain_explorer),
    "clusters and accuracy": (clusters, cluster_explorer_with_images),
}


def tree(widget):
    """Yield a widget and all that it holds."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from tree(child)


def every(view, kind):
    return [widget for widget in tree(view) if isinstance(widget, kind)]


def control(view, description):
    """Return the control whose label begins so."""
    (found,) = (w for w in tree(view) if getattr(w, "description", "").startswith(description))
    return found


def shown(view, name):
    """Return the widget that shows something: the picture, say."""
    return next(w for w in tree(view) if f"kclib-{name}" in w._dom_classes)


def picture(view):
    return shown(view, "picture").value


def status(view):
    return shown(view, "status")


def opened(name="clusters"):
    """Return an explorer and its view."""
    make, explorer = VIEWS[name]
    explorer = explorer()
    return explorer, make(explorer)


def settled(explorer):
    assert explorer.wait(PATIENCE)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    """No test waits until nobody moves a slider."""
    monkeypatch.setattr(_cluster_explorer, "_REST", 0.0)


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Every figure that was drawn, and as what: drawn again, a colour bar's place can differ a little."""
    result, image = {}, _controls.image

    def recorded(figure):
        result[figure] = image(figure)
        return result[figure]

    monkeypatch.setattr(_controls, "image", recorded)
    return result


def expected(explorer, drawn):
    """Return what a view's picture has to be."""
    answer = explorer.answer
    return answer.sheet() if isinstance(explorer, ClusterExplorer) else drawn[answer.figure]


def choices(explorer, monkeypatch):
    """Return a list that will hold all that is asked of an explorer."""
    asked, choose = [], explorer.choose
    monkeypatch.setattr(explorer, "choose", lambda **changes: asked.append(changes) or choose(**changes))
    return asked


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_opens_on_the_answer_and_on_controls_that_say_the_question(name, drawn):
    explorer, view = opened(name)
    assert explorer.answer.question == explorer.question
    assert picture(view).startswith(("<svg", "<img"))
    assert picture(view) == expected(explorer, drawn)
    assert status(view).value == NOTHING
    said = {w.value for w in tree(view) if isinstance(w, widgets.ValueWidget)}
    for value in vars(explorer.question).values():
        assert (str(value) if isinstance(value, int) else value) in said
    for text in (*explorer.answer.facts, *explorer.answer.facts.values()):
        assert text in shown(view, "facts").value


def test_a_view_of_what_is_answered_already_answers_nothing_again(monkeypatch, drawn):
    explorer = plain_explorer()
    explorer.show()
    monkeypatch.setattr(explorer, "show", lambda: pytest.fail("answered again"))
    assert picture(explorers_widgets.clusters(explorer)) == expected(explorer, drawn)


CHOICES = [
    ("similarity", "layers", "layers", ("one", "two")),
    ("similarity", "layers", "layers", ("one",)),
    ("similarity", "distance", "distance", "euclidean"),
    ("map", "layers", "layers", ("two",)),
    ("map", "kernels compared", "kind", "raw"),
    ("map", "colour", "colour", "norm"),
    ("clusters", "layers", "layers", ("two",)),
    ("clusters", "codebook", "scope", "layer"),
    ("clusters", "distance", "distance", "scale-free"),
    ("clusters", "colour", "colour", COLOURINGS[1]),
    ("clusters", "K", "n_clusters", 21),
]


@pytest.mark.parametrize(("name", "description", "field", "value"), CHOICES)
def test_a_control_asks_its_own_question_and_shows_the_answer(
    name, description, field, value, drawn, monkeypatch
):
    explorer, view = opened(name)
    before, first, asked = vars(explorer.question).copy(), picture(view), choices(explorer, monkeypatch)
    control(view, description).value = str(value) if field == "n_clusters" else value
    assert asked == [{field: value}]
    assert vars(explorer.question) == before | {field: value}
    settled(explorer)
    assert picture(view) == expected(explorer, drawn)
    assert picture(view) != first
    assert status(view).value == NOTHING


@pytest.mark.parametrize(("name", "description", "field", "value"), CHOICES)
def test_a_control_follows_a_question_that_is_asked_in_python(name, description, field, value, monkeypatch):
    explorer, view = opened(name)
    first, asked = picture(view), choices(explorer, monkeypatch)
    explorer.choose(**{field: value})
    assert asked == [{field: value}], "the view asks nothing of its own"
    assert control(view, description).value == (str(value) if field == "n_clusters" else value)
    settled(explorer)
    assert getattr(explorer.question, field) == value
    assert picture(view) != first


def test_the_numbers_beside_the_picture_are_the_answers():
    explorer, view = opened()
    facts = shown(view, "facts")
    before = facts.value
    control(view, "K").value = str(33)
    settled(explorer)
    assert facts.value != before
    assert explorer.answer.facts
    for text in (*explorer.answer.facts, *explorer.answer.facts.values()):
        assert text in facts.value


def test_slider_and_entry_follow_each_other_and_the_explorer():
    explorer, view = opened()
    slider, entry = control(view, "clusters K"), control(view, "K")
    assert (round(slider.value), entry.value) == (8, "8")
    slider.value = 2**4.125
    assert (entry.value, explorer.question.n_clusters) == ("17", 17)
    assert slider.value == 2**4.125, "the thumb stays where it was let go"
    entry.value = "29"
    assert explorer.question.n_clusters == 29
    assert slider.value == pytest.approx(29, rel=0.1)
    explorer.choose(n_clusters=5)
    assert (round(slider.value), entry.value) == (5, "5")
    settled(explorer)
    assert explorer.answer.question.n_clusters == 5


@pytest.mark.parametrize("name", ["clusters", "map"])
def test_the_slider_spans_one_to_all_in_equal_ratios_and_any_k_between_can_be_entered(name):
    explorer, view = opened(name)
    slider, entry = control(view, "clusters K"), control(view, "K")
    assert (slider.base, slider.min, slider.max) == (2, 0, pytest.approx(math.log2(36)))
    for k in (*range(1, 37), 2):
        entry.value = str(k)
        assert explorer.question.n_clusters == k
        step = math.log2(slider.value) / slider.step
        assert k == 36 or step == pytest.approx(round(step)), "a browser would move it to a step"
    for i in range(round((slider.max - slider.min) / slider.step)):
        slider.value = 2 ** (slider.min + i * slider.step)
        assert explorer.question.n_clusters == int(entry.value) == round(slider.value)
    slider.value = 2**slider.max
    assert explorer.question.n_clusters == 36
    assert entry.value == "36"
    settled(explorer)


def test_the_slider_of_clusterings_asks_while_it_moves_and_that_of_maps_when_it_is_let_go():
    assert control(opened()[1], "clusters K").continuous_update
    assert not control(opened("map")[1], "clusters K").continuous_update


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1e9", "K is 1 to 36."), ("37", "K is 1 to 36."), ("0", "K is 1 to 36."), ("-3", "K is 1 to 36."),
        ("3.7", "3.7 is no whole number: K is 1 to 36."), ("", "&#x27;&#x27; is no number: K is 1 to 36."),
        ("many", "&#x27;many&#x27; is no number: K is 1 to 36."),
        ("nan", "&#x27;nan&#x27; is no number: K is 1 to 36."),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_is_told_beside_the_field_and_left_as_typed(text, says, monkeypatch):
    explorer, view = opened()
    asked, entry = choices(explorer, monkeypatch), control(view, "K")
    (beside,) = (w for box in every(view, widgets.HBox) if entry in box.children for w in box.children[1:])
    entry.value = text
    assert says in beside.value
    assert (asked, entry.value) == ([], text)
    entry.value = "12"
    assert beside.value == NOTHING
    assert asked == [{"n_clusters": 12}]
    entry.value = text
    explorer.choose(n_clusters=9)
    assert (entry.value, beside.value) == ("9", NOTHING)
    settled(explorer)


@pytest.mark.parametrize("text", ["1e4", "10,000", "10_000", "10k", " 10 000 ", "0.01M", "10000.0"])
def test_a_number_can_be_written_in_many_ways(text):
    assert _controls.whole("K", text, 1_634_496) == 10_000


@pytest.mark.parametrize("text", ["10,00", "1e9999999999", "1,634,497", "0.5k2", "k", "inf", "1e-3"])
def test_what_is_no_number_in_range_is_refused(text):
    with pytest.raises(InvalidValueError, match=r"K is 1 to 1,634,496[.]$"):
        _controls.whole("K", text, 1_634_496)


def test_the_slider_ends_where_the_layers_do(monkeypatch):
    explorer, view = opened()
    slider, entry = control(view, "clusters K"), control(view, "K")
    entry.value = "30"
    asked = choices(explorer, monkeypatch)
    control(view, "layers").value = ("one",)
    assert asked == [{"layers": ("one",)}]
    assert slider.max == pytest.approx(math.log2(12))
    assert (entry.value, round(slider.value), explorer.question.n_clusters) == ("12", 12, 12)
    control(view, "layers").value = ("one", "two")
    assert slider.max == pytest.approx(math.log2(36))
    assert explorer.question.n_clusters == 12
    control(view, "codebook").value = "layer"
    assert slider.max == pytest.approx(math.log2(24))
    settled(explorer)


def test_fewer_layers_and_fewer_clusters_asked_for_at_once_are_all_that_is_asked(monkeypatch):
    explorer, view = opened()
    control(view, "K").value = str(30)
    asked = choices(explorer, monkeypatch)
    explorer.choose(layers=("one",), n_clusters=5)
    assert asked == [{"layers": ("one",), "n_clusters": 5}]
    assert (explorer.question.layers, explorer.question.n_clusters) == (("one",), 5)
    assert (control(view, "K").value, round(control(view, "clusters K").value)) == ("5", 5)
    settled(explorer)
    assert explorer.answer.question.n_clusters == 5


@pytest.mark.parametrize("name", VIEWS)
def test_every_control_has_a_label(name):
    _, view = opened(name)
    controls = every(view, (widgets.ValueWidget, widgets.Button))
    controls = [w for w in controls if not isinstance(w, (widgets.HTML, widgets.FloatProgress))]
    assert len(controls) >= 2
    labels = [w.description for w in controls]
    assert all(labels)
    assert len(set(labels)) == len(labels)


def test_each_distance_is_named_with_its_formula():
    _, view = opened("similarity")
    options = dict(control(view, "distance").options)
    assert list(options.values()) == list(distances.named_distances)
    for text, name in options.items():
        assert name in text
        assert distances.named_distances[name].formula in text


def test_everything_that_can_be_asked_can_be_chosen():
    _, view = opened()
    assert control(view, "layers").options == ("one", "two")
    assert dict(control(view, "codebook").options) == {v: k for k, v in SCOPES.items()}
    assert [name for _, name in control(view, "distance").options] == list(METHODS)
    assert [name for _, name in control(view, "colour").options] == list(COLOURINGS)
    _, view = opened("map")
    assert [name for _, name in control(view, "kernels compared").options] == ["unit", "raw"]
    assert [name for _, name in control(view, "colour").options] == list(COLOURS)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_holds_no_output_area_which_could_make_a_batch_wait_for_ever(name):
    explorer, view = opened(name)
    control(view, "layers").value = ("one",)
    settled(explorer)
    assert every(view, widgets.Output) == []


@pytest.mark.parametrize("name", VIEWS)
def test_no_figure_is_left_open(name):
    explorer, view = opened(name)
    control(view, "layers").value = ("one",)
    settled(explorer)
    if name == "clusters and accuracy":
        evaluated(explorer, view)
    assert plt.get_fignums() == []


def test_the_status_says_what_is_under_way_and_is_cleared_when_it_is_done(monkeypatch):
    explorer, view = opened()
    gate, answered = Gate(), explorer.answered
    monkeypatch.setattr(explorer, "answered", lambda *args: gate() or answered(*args))
    gate.close()
    before = picture(view)
    control(view, "distance").value = "symmetric"
    assert gate.reached.wait(PATIENCE)
    assert status(view).value == f"<span role='status'>{explorer.announced(explorer.question)}</span>"
    assert "removes" in status(view).value
    assert picture(view) == before, "the old picture stays until there is a new one"
    gate.open.set()
    settled(explorer)
    assert status(view).value == NOTHING
    assert picture(view) != before


@pytest.mark.parametrize(
    ("name", "description", "value"), [("clusters", "K", "20"), ("map", "colour", "norm")]
)
def test_the_picture_changes_once_for_an_answer(name, description, value, drawn):
    explorer, view = opened(name)
    changes = []
    shown(view, "picture").observe(lambda change: changes.append(change.new), "value")
    control(view, description).value = value
    settled(explorer)
    explorer.tell()
    assert changes[-1] == expected(explorer, drawn)
    assert len(changes) == len(set(changes)) <= (2 if name == "clusters" else 1), "a sketch, and the answer"


def test_a_picture_of_another_question_is_seen_to_be_one(monkeypatch):
    explorer, view = opened()
    gate, answered = Gate(), explorer.answered
    monkeypatch.setattr(explorer, "answered", lambda *args: gate() or answered(*args))
    gate.close()
    old = shown(view, "picture")._dom_classes
    control(view, "distance").value = "symmetric"
    assert gate.reached.wait(PATIENCE)
    assert set(shown(view, "picture")._dom_classes) - set(old) == {"kclib-old"}
    gate.open.set()
    settled(explorer)
    assert shown(view, "picture")._dom_classes == old


def panel(view, name):
    """Show a panel beside the codebook, and return what it says and draws."""
    (tab,) = every(view, widgets.Tab)
    tab.selected_index = tab.titles.index(name)
    return [w.value for w in tree(tab.children[tab.selected_index]) if isinstance(w, widgets.HTML)][-2:]


def test_the_members_of_a_representative_are_counted_by_layer_and_shown_from_near_to_far():
    explorer, view = opened()
    for rank in (1, 5):
        panel(view, "Members")
        control(view, "no. on the sheet").value = rank
        line, drawing = panel(view, "Members")
        book, i = explorer.answer.most_used[rank - 1]
        (group,) = explorer.answer.clustering.groups
        index = next(j for j, kernel in enumerate(group.codebook) if (kernel == book.kernels[i]).all())
        rows = np.flatnonzero(group.indices == index)
        assert f"No. {rank} stands for {len(rows):,} kernels" in line
        for layer in explorer.bank.layers:
            n = np.count_nonzero((rows >= layer.start) & (rows < layer.start + layer.n_kernels))
            assert (f"{layer.name} ({n})" in line) == (n > 0)
        apart = np.linalg.norm((explorer.bank.kernels[rows] - book.kernels[i]).reshape(len(rows), -1), axis=1)
        for end in (apart.min(), apart.max()):
            assert f">{end:.2g}</text>" in drawing
        assert picture(view) == explorer.answer.sheet(rank - 1) != explorer.answer.sheet()
    panel(view, "Layers")
    assert picture(view) == explorer.answer.sheet()


def test_the_error_of_each_layer_is_that_of_the_clustering():
    explorer, view = opened()
    for k in ("8", "20"):
        control(view, "K").value = k
        settled(explorer)
        _, drawing = panel(view, "Layers")
        lost = clustering.error_share(explorer.bank, explorer.clustering(explorer.question))
        for layer, share in zip(explorer.bank.layers, lost, strict=True):
            assert f">{layer.name}</text>" in drawing
            assert f">{100 * share:.1f} %</text>" in drawing


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_filter_is_shown_before_and_after(scope):
    explorer, view = opened()
    explorer.choose(scope=scope, distance="symmetric")
    settled(explorer)
    panel(view, "Filter")
    control(view, "layer of the filter").value = "two"
    control(view, "filter").value = 3
    line, _ = panel(view, "Filter")
    found = explorer.clustering(explorer.question)
    rows = slice(12 + 2 * 4, 12 + 3 * 4)
    before, after = explorer.bank.kernels[rows], quantized(found)[rows]
    assert f"Filter 3 of 6 loses {100 * ((before - after) ** 2).sum() / (before**2).sum():.1f} %" in line
    shown_before, shown_after, _ = _details.one_filter(explorer.bank, found, "two", 2)
    np.testing.assert_array_equal(shown_before, before)
    np.testing.assert_allclose(shown_after, after, rtol=1e-6)


def test_a_panel_says_that_it_waits_for_the_clustering(monkeypatch):
    explorer, view = opened()
    gate, answered = Gate(), explorer.answered
    monkeypatch.setattr(explorer, "answered", lambda *args: gate() or answered(*args))
    gate.close()
    control(view, "K").value = "20"
    assert gate.reached.wait(PATIENCE)
    assert "once the slider rests" in panel(view, "Members")[0]
    gate.open.set()
    settled(explorer)
    assert "No. 1 stands for" in panel(view, "Members")[0]


def test_a_sentence_of_what_went_wrong_is_shown_as_it_is_and_the_picture_stays(monkeypatch):
    explorer, view = opened()
    before = picture(view)

    def refuse(*_):
        raise InvalidValueError("K < 3 & <b>bold</b>.")

    monkeypatch.setattr(explorer, "answered", refuse)
    control(view, "distance").value = "symmetric"
    settled(explorer)
    assert status(view).value == "<span role='status'>K &lt; 3 &amp; &lt;b&gt;bold&lt;/b&gt;.</span>"
    assert picture(view) == before


def test_a_choice_that_is_refused_says_why_and_asks_nothing(monkeypatch):
    explorer, view = opened()
    before = explorer.question
    control(view, "layers").value = ()
    assert "no layer is named; name at least one." in status(view).value
    assert explorer.question is before
    monkeypatch.setattr(explorer, "check", lambda question: distances.named("<i>"))
    control(view, "K").value = str(20)
    assert "unknown distance &#x27;&lt;i&gt;&#x27;" in status(view).value
    assert explorer.question is before


def evaluated(explorer, view):
    control(view, "Evaluate").click()
    settled(explorer)


def accuracy(view):
    """Return the line that says what is known of accuracy, and the table."""
    (column,) = (w for w in every(view, widgets.VBox) if shown(view, "accuracy") in w.children)
    return column.children[2:]


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def evaluating(gate):
    explorer = ClusterExplorer(model(gate), images(), n_clusters=8)
    return explorer, explorers_widgets.clusters(explorer)


def test_without_images_there_is_no_button_to_evaluate():
    _, view = opened("clusters")
    assert every(view, widgets.Button) == []


def test_evaluate_and_cancel_can_be_pressed_when_they_would_do_something(evaluating, gate):
    explorer, view = evaluating
    start, stop = control(view, "Evaluate"), control(view, "Cancel")
    (bar,) = every(view, widgets.FloatProgress)
    line, _ = accuracy(view)
    assert (start.disabled, stop.disabled, bar.layout.display) == (False, True, "none")
    assert "not evaluated yet" in line.value
    gate.close()
    start.click()
    assert gate.reached.wait(PATIENCE)
    assert (start.disabled, stop.disabled, bar.layout.display) == (True, False, "flex")
    assert "K = 8 on 70 images: 0%" in line.value
    gate.open.set()
    settled(explorer)
    assert (start.disabled, stop.disabled, bar.layout.display) == (False, True, "none")
    assert f"top-1 of what is shown: {explorer.rows[-1]['top1']:.2f} %" in line.value


def test_the_bar_and_the_time_left_move_while_images_are_answered(evaluating):
    explorer, view = evaluating
    (bar,), (line, _) = every(view, widgets.FloatProgress), accuracy(view)
    shares, said = [], []
    bar.observe(lambda change: shares.append(change.new), "value")
    line.observe(lambda change: said.append(change.new), "value")
    evaluated(explorer, view)
    assert shares == pytest.approx([64 / 140, 0.5, 0.5 + 64 / 140, 1, 0])  # two batches each
    timed = [text for text in said if "46%" in text or "96%" in text]
    assert timed
    assert all("about 00:0" in text for text in timed)
    assert sum("%, about" in text for text in said) >= 3


def test_the_number_of_images_is_chosen_within_those_there_are(evaluating):
    explorer, view = evaluating
    entry = control(view, "test images")
    assert entry.value == "70"
    entry.value = "71"
    evaluated(explorer, view)
    assert explorer.rows == ()
    assert any("test images is 1 to 70." in line.value for line in every(view, widgets.HTML))
    entry.value = "9"
    evaluated(explorer, view)
    assert [row["images"] for row in explorer.rows] == [9, 9]


def test_the_table_and_the_chart_grow_with_each_evaluation(evaluating):
    explorer, view = evaluating
    _, table = accuracy(view)
    chart = shown(view, "accuracy")
    assert table.value == ""
    for count, k in enumerate((8, 20, 36), 1):
        control(view, "K").value = str(k)
        evaluated(explorer, view)
        assert chart.value.count("measured: K = ") == count
        assert f"measured: K = {k}, {explorer.rows[-1]['top1']:.2f} %" in chart.value
        assert table.value.count("<tr") == 1 + len(explorer.rows)
        row = explorer.rows[-1]
        for text in (f"{row['kernels_removed']:.3f}", f"{row['bytes_removed']:.2f}", f"{row['top1']:.2f} ["):
            assert text in table.value
    assert len(explorer.rows) == 4
    assert table.value.count("dense model") == 1
    assert table.value.index("drop (points)") < table.value.index("top-1 (%)"), "the drop needs no scrolling"


def test_stored_accuracy_is_a_curve_with_a_dot_at_what_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path))
    kclib.sweep(model(), images(), [2, 8, 32], scopes=["global"])
    explorer = ClusterExplorer(model(), images(), n_clusters=8)
    view = explorers_widgets.clusters(explorer)
    known = explorer.known()
    assert known.k.tolist() == [0, 2, 8, 32]
    chart, (line, _) = shown(view, "accuracy"), accuracy(view)
    assert chart.value.count("stored: K = ") == 3
    assert f"{known.top1[2]:.1f} %, stored at K = 8" in line.value
    control(view, "K").value = "16"
    assert f"{(known.top1[2] + known.top1[3]) / 2:.1f} %, between K = 8 and 32" in line.value
    assert "between K = 8 and 32" in chart.value
    control(view, "K").value = "36"
    assert "between" not in chart.value + line.value, "the curve does not reach so far"
    settled(explorer)
    for changes in ({"scope": "layer"}, {"scope": "global", "distance": "symmetric"}, {"layers": ("one",)}):
        explorer.choose(**changes)
        settled(explorer)
        assert "stored: K = " not in chart.value, "it is of other clusterings"


def test_accuracy_known_already_can_be_given(tmp_path):
    given = kclib.sweep(model(), images(), [4], scopes=["layer"], store=Store(tmp_path))
    explorer = ClusterExplorer(model(), images(), n_clusters=8, measured=given)
    explorer.choose(scope="layer", n_clusters=4)
    assert explorer.known().k.tolist() == [0, 4]
    settled(explorer)


def test_an_evaluation_that_cannot_be_says_why(evaluating, monkeypatch):
    explorer, view = evaluating

    def refuse(n_images):
        raise InvalidValueError("no <images>.")

    monkeypatch.setattr(explorer, "evaluate", refuse)
    control(view, "Evaluate").click()
    assert "no &lt;images&gt;." in accuracy(view)[0].value


def test_names_of_layers_are_no_markup_in_the_table():
    explorer = ClusterExplorer(model(lambda: None, ("<b>one", "two")), images(), n_clusters=8)
    view = explorers_widgets.clusters(explorer)
    explorer.choose(layers=("<b>one",))
    evaluated(explorer, view)
    _, table = accuracy(view)
    assert "&lt;b&gt;one" in table.value
    assert "<b>" not in table.value


@pytest.mark.parametrize("name", VIEWS)
def test_the_saved_state_holds_the_pictures_and_the_values_of_all_controls(name):
    explorer, view = opened(name)
    control(view, "layers").value = ("one",)
    settled(explorer)
    if name == "clusters and accuracy":
        evaluated(explorer, view)
    kept = embed.dependency_state(view)
    every_kept = widgets.Widget.get_manager_state()["state"]
    for state in (kept, every_kept):
        assert {widget.model_id for widget in tree(view)} <= set(state)
        for box in every(view, (widgets.HTML, widgets.Text, widgets.FloatLogSlider)):
            assert state[box.model_id]["state"].get("value", "") == box.value
        layers = state[control(view, "layers").model_id]["state"]
        assert [layers["_options_labels"][i] for i in layers["index"]] == ["one"]


def test_two_views_of_one_explorer_follow_each_other(drawn):
    explorer, first = opened()
    second = explorers_widgets.clusters(explorer)
    control(first, "K").value = str(20)
    assert control(second, "K").value == "20"
    settled(explorer)
    assert picture(first) == picture(second) == expected(explorer, drawn)


def test_a_question_that_comes_while_a_view_shows_an_older_one_is_not_taken_back(drawn):
    """The older one's values, put on the controls, are no choice of a person."""
    newer_is_asked = threading.Event()

    class Slow(ClusterExplorer):
        """Has another thread ask something else while the view looks at its first question."""

        meanwhile = None

        @property
        def largest(self):
            if self.meanwhile:
                meanwhile, self.meanwhile = self.meanwhile, None
                meanwhile()
            return super().largest

    explorer = Slow(model(), n_clusters=8)
    other = threading.Thread(
        target=lambda: explorer.choose(layers=("two",), distance="scale-free"), daemon=True
    )

    def meanwhile():
        other.start()
        assert newer_is_asked.wait(PATIENCE)

    def first_to_hear():
        if threading.current_thread() is other:
            newer_is_asked.set()

    explorer.listeners.append(first_to_hear)
    view = explorers_widgets.clusters(explorer)
    explorer.meanwhile = meanwhile
    chooser = threading.Thread(target=lambda: explorer.choose(layers=("one",)), daemon=True)
    chooser.start()
    for thread in (chooser, other):
        thread.join(5)
        assert not thread.is_alive(), "they wait for each other"
    settled(explorer)
    assert (explorer.question.layers, explorer.question.distance) == (("two",), "scale-free")
    assert control(view, "layers").value == ("two",)
    assert control(view, "distance").value == "scale-free"
    assert picture(view) == expected(explorer, drawn)


def test_a_view_moved_from_many_threads_ends_on_the_question_and_its_answer(drawn):
    """Subshells of a kernel run callbacks side by side."""
    explorer, view = opened()
    start, failures = threading.Barrier(8), []

    def move(i):
        try:
            start.wait(PATIENCE)
            for j in range(6):
                if i % 2:
                    control(view, "K").value = str(2 + (5 * i + j) % 11)
                else:
                    explorer.choose(layers=(("one",), ("two",), ("one", "two"))[(i + j) % 3])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=move, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    settled(explorer)
    assert explorer.answer.question == explorer.question
    assert control(view, "layers").value == explorer.question.layers
    assert control(view, "K").value == str(explorer.question.n_clusters)
    assert picture(view) == expected(explorer, drawn)
    assert status(view).value == NOTHING


def test_a_figure_is_twice_as_sharp_as_it_is_large_and_says_what_it_shows():
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.set(title="<Title>", xlabel="distance", ylabel="pairs")
    image = _controls.image(figure)
    plt.close(figure)
    assert image.startswith('<img alt="&lt;Title&gt;; pairs against distance" width="200"')
    data = base64.b64decode(image.partition("base64,")[2].removesuffix('">'))
    assert [int.from_bytes(data[start : start + 4], "big") for start in (16, 20)] == [400, 200]


@pytest.mark.parametrize("name", VIEWS)
def test_no_widget_has_a_title_that_says_null_and_every_picture_says_what_it_shows(name):
    _, view = opened(name)
    for widget in every(view, (widgets.ValueWidget, widgets.Button)):
        assert widget.tooltip is not None
    for drawing in every(view, widgets.HTML):
        for tag in re.findall("<(?:img|svg)[^>]*>", drawing.value):
            assert re.search('(?:alt|aria-label)="[^"]{20,}"', tag)
