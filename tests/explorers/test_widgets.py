import base64
import json
import math
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

from kclib import kernels
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError
from kclib.explorers import ClusterExplorer, MapExplorer, SimilarityExplorer, _cluster_explorer
from kclib.explorers import widgets as explorers_widgets
from kclib.explorers._map_explorer import COLOURS
from kclib.explorers.widgets import clusters, maps
from kclib.models import Model
from kclib.similarity import distances
from kclib.similarity.embedding import Graph

NOTHING = "<span role='status'>&nbsp;</span>"
PNG = b"\x89PNG"

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


def png_of(image):
    return bytes(image.value)


def picture(view):
    return png_of(every(view, widgets.Image)[0])


def status(view):
    return every(view, widgets.HTML)[0]


def opened(name="clusters"):
    """Return an explorer and its view."""
    make, explorer = VIEWS[name]
    explorer = explorer()
    return explorer, make(explorer)


def settled(explorer):
    assert explorer.wait(PATIENCE)


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Every figure that was drawn, and as what: drawn again, a colour bar's place can differ a little."""
    result, png = {}, explorers_widgets.png

    def recorded(figure):
        result[figure] = png(figure)
        return result[figure]

    monkeypatch.setattr(explorers_widgets, "png", recorded)
    return result


def choices(explorer, monkeypatch):
    """Return a list that will hold all that is asked of an explorer."""
    asked, choose = [], explorer.choose
    monkeypatch.setattr(explorer, "choose", lambda **changes: asked.append(changes) or choose(**changes))
    return asked


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_opens_on_the_answer_and_on_controls_that_say_the_question(name, drawn):
    explorer, view = opened(name)
    assert explorer.answer.question == explorer.question
    assert picture(view).startswith(PNG)
    assert picture(view) == drawn[explorer.answer.figure]
    assert status(view).value == NOTHING
    for field in vars(explorer.question):
        shown = {w.value for w in tree(view) if isinstance(w, widgets.ValueWidget)}
        assert getattr(explorer.question, field) in shown
    for text in (*explorer.answer.facts, *explorer.answer.facts.values()):
        assert text in every(view, widgets.HTML)[1].value


def test_a_view_of_what_is_answered_already_answers_nothing_again(monkeypatch, drawn):
    explorer = plain_explorer()
    explorer.show()
    monkeypatch.setattr(explorer, "show", lambda: pytest.fail("answered again"))
    assert picture(explorers_widgets.clusters(explorer)) == drawn[explorer.answer.figure]


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
    ("clusters", "colour", "colour", _cluster_explorer.COLOURS[1]),
    ("clusters", "K", "n_clusters", 21),
]


@pytest.mark.parametrize(("name", "description", "field", "value"), CHOICES)
def test_a_control_asks_its_own_question_and_shows_the_answer(
    name, description, field, value, drawn, monkeypatch
):
    explorer, view = opened(name)
    before, shown, asked = vars(explorer.question).copy(), picture(view), choices(explorer, monkeypatch)
    control(view, description).value = value
    assert asked == [{field: value}]
    assert vars(explorer.question) == before | {field: value}
    settled(explorer)
    assert picture(view) == drawn[explorer.answer.figure]
    assert picture(view) != shown
    assert status(view).value == NOTHING


@pytest.mark.parametrize(("name", "description", "field", "value"), CHOICES)
def test_a_control_follows_a_question_that_is_asked_in_python(name, description, field, value, monkeypatch):
    explorer, view = opened(name)
    shown, asked = picture(view), choices(explorer, monkeypatch)
    explorer.choose(**{field: value})
    assert asked == [{field: value}], "the view asks nothing of its own"
    assert control(view, description).value == value
    settled(explorer)
    assert getattr(explorer.question, field) == value
    assert picture(view) != shown


def test_the_numbers_beside_the_picture_are_the_answers():
    explorer, view = opened()
    facts = every(view, widgets.HTML)[1]
    before = facts.value
    control(view, "K").value = 33
    settled(explorer)
    assert facts.value != before
    assert explorer.answer.facts
    for text in (*explorer.answer.facts, *explorer.answer.facts.values()):
        assert text in facts.value


def test_slider_and_entry_follow_each_other_and_the_explorer():
    explorer, view = opened()
    slider, entry = control(view, "clusters K"), control(view, "K")
    assert (round(slider.value), entry.value) == (8, 8)
    slider.value = 2**4.125
    assert (entry.value, explorer.question.n_clusters) == (17, 17)
    assert slider.value == 2**4.125, "the thumb stays where it was let go"
    entry.value = 29
    assert (slider.value, explorer.question.n_clusters) == (29, 29)
    explorer.choose(n_clusters=5)
    assert (slider.value, entry.value) == (5, 5)
    settled(explorer)
    assert explorer.answer.question.n_clusters == 5


@pytest.mark.parametrize("name", ["clusters", "map"])
def test_the_slider_spans_two_to_all_in_equal_ratios_and_any_k_between_can_be_entered(name, monkeypatch):
    explorer, view = opened(name)
    slider, entry = control(view, "clusters K"), control(view, "K")
    assert (slider.base, slider.min, slider.max) == (2, 1, pytest.approx(math.log2(36)))
    assert (entry.min, entry.max) == (2, 36)
    for k in (*range(2, 37), 2):
        entry.value = k
        assert (explorer.question.n_clusters, round(slider.value)) == (k, k)
    for i in range(round((slider.max - slider.min) / slider.step)):
        slider.value = 2 ** (slider.min + i * slider.step)
        assert explorer.question.n_clusters == entry.value == round(slider.value)
    slider.value = 2**slider.max
    assert explorer.question.n_clusters == entry.value == 36
    settled(explorer)


def test_the_slider_asks_when_it_is_let_go():
    _, view = opened()
    assert not control(view, "clusters K").continuous_update


def test_an_entry_out_of_range_becomes_the_nearest_k_there_is():
    explorer, view = opened()
    entry = control(view, "K")
    entry.value = 1000
    assert explorer.question.n_clusters == entry.value == 36
    entry.value = -3
    assert explorer.question.n_clusters == entry.value == 2
    settled(explorer)


def test_the_slider_ends_where_the_layers_do(monkeypatch):
    explorer, view = opened()
    slider, entry = control(view, "clusters K"), control(view, "K")
    entry.value = 30
    asked = choices(explorer, monkeypatch)
    control(view, "layers").value = ("one",)
    assert asked == [{"layers": ("one",)}]
    assert (entry.max, slider.max) == (12, pytest.approx(math.log2(12)))
    assert (entry.value, round(slider.value), explorer.question.n_clusters) == (12, 12, 12)
    control(view, "layers").value = ("one", "two")
    assert (entry.max, slider.max) == (36, pytest.approx(math.log2(36)))
    assert explorer.question.n_clusters == 12
    control(view, "codebook").value = "layer"
    assert entry.max == 24
    settled(explorer)


def test_fewer_layers_and_fewer_clusters_asked_for_at_once_are_all_that_is_asked(monkeypatch):
    explorer, view = opened()
    control(view, "K").value = 30
    asked = choices(explorer, monkeypatch)
    explorer.choose(layers=("one",), n_clusters=5)
    assert asked == [{"layers": ("one",), "n_clusters": 5}]
    assert (explorer.question.layers, explorer.question.n_clusters) == (("one",), 5)
    assert (control(view, "K").value, round(control(view, "clusters K").value)) == (5, 5)
    settled(explorer)
    assert explorer.answer.question.n_clusters == 5


@pytest.mark.parametrize("name", VIEWS)
def test_every_control_has_a_label(name):
    _, view = opened(name)
    controls = every(view, (widgets.ValueWidget, widgets.Button))
    controls = [
        w for w in controls if not isinstance(w, (widgets.Image, widgets.HTML, widgets.FloatProgress))
    ]
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
    assert dict(control(view, "codebook").options) == {v: k for k, v in _cluster_explorer.SCOPES.items()}
    assert [name for _, name in control(view, "distance").options] == list(_cluster_explorer.METHODS)
    assert [name for _, name in control(view, "colour").options] == list(_cluster_explorer.COLOURS)
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
    control(view, "K").value = 20
    assert gate.reached.wait(PATIENCE)
    assert status(view).value == f"<span role='status'>{explorer.announced(explorer.question)}</span>"
    assert "removes" in status(view).value
    assert picture(view) == before, "the old picture stays until there is a new one"
    gate.open.set()
    settled(explorer)
    assert status(view).value == NOTHING
    assert picture(view) != before


def test_the_picture_is_drawn_and_changed_once_for_an_answer(monkeypatch, drawn):
    explorer, view = opened()
    png, figures = explorers_widgets.png, []
    monkeypatch.setattr(explorers_widgets, "png", lambda figure: figures.append(figure) or png(figure))
    changes = []
    every(view, widgets.Image)[0].observe(lambda change: changes.append(change.new), "value")
    control(view, "K").value = 20
    settled(explorer)
    explorer.tell()
    assert changes == [drawn[explorer.answer.figure]]
    assert figures == [explorer.answer.figure]


def test_a_sentence_of_what_went_wrong_is_shown_as_it_is_and_the_picture_stays(monkeypatch):
    explorer, view = opened()
    before = picture(view)

    def refuse(*_):
        raise InvalidValueError("K < 3 & <b>bold</b>.")

    monkeypatch.setattr(explorer, "answered", refuse)
    control(view, "K").value = 20
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
    control(view, "K").value = 20
    assert "unknown distance &#x27;&lt;i&gt;&#x27;" in status(view).value
    assert explorer.question is before


def evaluated(explorer, view):
    control(view, "Evaluate").click()
    settled(explorer)


def accuracy(view):
    """Return the line that says what is known of accuracy, and the table."""
    return every(view, widgets.HTML)[2:]


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
    assert (start.disabled, stop.disabled, bar.layout.visibility) == (False, True, "hidden")
    assert "not evaluated yet" in line.value
    gate.close()
    start.click()
    assert gate.reached.wait(PATIENCE)
    assert (start.disabled, stop.disabled, bar.layout.visibility) == (True, False, "visible")
    assert "K = 8 on 70 images: 0%" in line.value
    gate.open.set()
    settled(explorer)
    assert (start.disabled, stop.disabled, bar.layout.visibility) == (False, True, "hidden")
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
    entry = control(view, "test images (1 to 70)")
    assert (entry.value, entry.min, entry.max) == (70, 1, 70)
    entry.value = 9
    evaluated(explorer, view)
    assert [row["images"] for row in explorer.rows] == [9, 9]


def test_the_table_and_the_curve_grow_with_each_evaluation(evaluating):
    explorer, view = evaluating
    _, table = accuracy(view)
    curve = every(view, widgets.Image)[1]
    assert (table.value, png_of(curve), curve.layout.display) == ("", b"", "none")
    seen = []
    for k in (8, 20, 1000):
        control(view, "K").value = k
        evaluated(explorer, view)
        seen.append(png_of(curve))
        assert table.value.count("<tr") == 1 + len(explorer.rows)
        row = explorer.rows[-1]
        for text in (f"{row['kernels_removed']:.3f}", f"{row['bytes_removed']:.2f}", f"{row['top1']:.2f} ["):
            assert text in table.value
    assert len(explorer.rows) == 4
    assert table.value.count("dense model") == 1
    assert len(set(seen)) == 3
    assert seen[-1].startswith(PNG)
    assert curve.layout.display != "none"
    for unit in ("(%)", "(points)"):
        assert unit in table.value


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
        for image in every(view, widgets.Image):
            (buffer,) = (b for b in state[image.model_id]["buffers"] if b["path"] == ["value"])
            assert base64.b64decode(buffer["data"]) == png_of(image)
        for box in every(view, (widgets.BoundedIntText, widgets.FloatLogSlider)):
            assert state[box.model_id]["state"]["value"] == box.value
        layers = state[control(view, "layers").model_id]["state"]
        assert [layers["_options_labels"][i] for i in layers["index"]] == ["one"]
    snippet = embed.embed_snippet([view], state=kept)
    assert json.dumps(base64.b64encode(picture(view)).decode())[1:-1] in snippet


def test_two_views_of_one_explorer_follow_each_other(drawn):
    explorer, first = opened()
    second = explorers_widgets.clusters(explorer)
    control(first, "K").value = 20
    assert control(second, "K").value == 20
    settled(explorer)
    assert picture(first) == picture(second) == drawn[explorer.answer.figure]


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
    assert picture(view) == drawn[explorer.answer.figure]


def test_a_view_moved_from_many_threads_ends_on_the_question_and_its_answer(drawn):
    """Subshells of a kernel run callbacks side by side."""
    explorer, view = opened()
    start, failures = threading.Barrier(8), []

    def move(i):
        try:
            start.wait(PATIENCE)
            for j in range(6):
                if i % 2:
                    control(view, "K").value = 2 + (5 * i + j) % 11
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
    assert control(view, "K").value == explorer.question.n_clusters
    assert picture(view) == drawn[explorer.answer.figure]
    assert status(view).value == NOTHING


def test_a_picture_has_a_hundred_pixels_an_inch():
    figure = plt.figure(figsize=(2, 1))
    result = explorers_widgets.png(figure)
    assert result.startswith(PNG)
    width, height = (int.from_bytes(result[start : start + 4], "big") for start in (16, 20))
    assert (width, height) == (200, 100)
