import contextvars
import math
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gates import PATIENCE, Gate, Through
from torch import nn

from kclib import clustering, compression, datasets, evaluation, experiments, kmeans
from kclib.clustering import _clustering, _scopes
from kclib.compression import byte_counts
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.evaluation import _accuracy
from kclib.explorers import ClusterExplorer, _cluster_explorer, _clusterer
from kclib.explorers._background import Explorer
from kclib.explorers._cluster_explorer import Running
from kclib.explorers._clusterer import COLOURS, METHODS, ClusterQuestion
from kclib.kmeans import symmetric as kmeans_symmetric
from kclib.models import Model
from kclib.store import Store

LAYERS = ("0", "2")  # of 24 and 128 kernels
ALL = 152

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    """No test waits until nobody moves a slider."""
    monkeypatch.setattr(_cluster_explorer, "_REST", 0.0)


def tiny_model(call=lambda: None) -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        Through(lambda: call()), nn.BatchNorm1d(16, affine=False),
    )  # fmt: skip
    with torch.no_grad():  # so that answers differ
        network[-1].running_mean.copy_(network[:6](inputs(tiny_images())).mean(0))
    return Model("tiny", network.eval(), lambda images: images.float() / 255 - 0.5)


def tiny_images() -> ImageSet:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, 3, 1, 1), dtype=torch.uint8, generator=draw).expand(200, 3, 8, 8)
    return ImageSet("tiny/test", images, torch.zeros(200, dtype=torch.int64), tuple("abcdefghijklmnop"), "0")


def inputs(images):
    return images.images.float() / 255 - 0.5


def labelled(model) -> ImageSet:
    """Return images that the model answers rightly, but for one in ten."""
    images = tiny_images()
    labels = model.network(inputs(images)).argmax(1)
    labels[::10] = (labels[::10] + 1) % 16
    return ImageSet(images.name, images.images, labels, images.classes, images.fingerprint)


@pytest.fixture
def explorer():
    return ClusterExplorer(tiny_model(), n_clusters=20, seed=5)


@pytest.fixture
def gate():
    """Passed by every batch that a network of `evaluating` answers."""
    return Gate()


@pytest.fixture
def evaluating(gate):
    """An explorer with images."""
    images = labelled(tiny_model())
    return ClusterExplorer(tiny_model(gate), images, n_clusters=20, seed=5)


@pytest.fixture
def fits(monkeypatch):
    """The K of each fit made; trees and sketches are not counted."""
    made = []

    def counted(genuine):
        return lambda points, n_clusters, **options: (
            made.append(n_clusters) or genuine(points, n_clusters, **options)
        )

    for owner, name in ((kmeans.Tree, "fit"), (kmeans, "fit"), (kmeans_symmetric, "fit")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return made


def asked(explorer, **changes):
    explorer.choose(**changes)
    assert explorer.wait(PATIENCE)
    assert explorer.status == ""
    return explorer.answer


def evaluated(explorer, n_images, **changes):
    """Return the newest row after an evaluation."""
    if changes:
        asked(explorer, **changes)
    explorer.evaluate(n_images)
    assert explorer.wait(PATIENCE)
    assert (explorer.running, explorer.evaluation_status) == (None, "")
    return explorer.rows[-1]


def answered(explorer):
    """Wait for the answer alone, not for an evaluation."""
    assert Explorer.wait(explorer, PATIENCE)
    return explorer.answer


def expected_clustering(bank, question, seed=5):
    """Cluster without the explorer: from a tree, or nearly one kernel each."""
    bank = bank.only(*question.layers)
    if question.distance != "euclidean":
        method = METHODS[question.distance]
        return clustering.cluster(
            bank, question.n_clusters, scope=question.scope, seed=seed, progress=False, **method
        )
    found, wanted = {}, {}
    for name, layers in _scopes.grouping(bank, question.scope).items():
        points = np.concatenate([bank.points[layer.rows] for layer in layers])
        k = wanted[name] = min(question.n_clusters, len(points))
        if 2 * k > len(points):
            found[name] = kmeans.fit(points, k, max_iter=1, seed=seed)
        else:
            found[name] = kmeans.tree(points, seed=seed).fit(k, max_iter=1)
    return _clustering.of_fits(bank, found, wanted, scope=question.scope, seed=seed)


QUESTIONS = [
    ClusterQuestion(layers, scope, k, distance)
    for distance in METHODS
    for layers, scope, k in (
        (LAYERS, "global", 20), (LAYERS, "global", 100), (LAYERS, "layer", 20), (LAYERS, "layer", 64),
        (("2",), "global", 16), (("0",), "layer", 24), (("0",), "global", 2),
    )
]  # fmt: skip


def described(question):
    layers = "+".join(question.layers)
    return f"{question.distance}-{layers}-{question.scope}-{question.n_clusters}"


@pytest.mark.parametrize("question", QUESTIONS, ids=described)
def test_the_answer_is_that_of_a_clustering_made_without_the_explorer(explorer, question):
    answer = asked(explorer, **vars(question))
    expected = expected_clustering(explorer.bank, question)
    saved = byte_counts.savings(explorer.model.network, expected)
    assert answer.question == question
    assert answer.facts == {
        "kernels": str(expected.n_kernels),
        "representatives": str(expected.n_clusters),
        "kernels removed": f"{100 * (1 - expected.n_clusters / expected.n_kernels):.3f} %",
        "bytes of all convolutions removed": f"{100 * saved.bytes:.2f} %",
        "with a 16-bit codebook": f"{100 * saved.bytes_fp16:.2f} %",
        "inertia": f"{expected.inertia:.4g}",
    }
    left, right = answer.figure.axes
    assert [line.get_label() for line in right.lines] == [group.name for group in expected.groups]
    uses = [clustering.by_use(group)[1] for group in expected.groups]
    assert [line.get_ydata().tolist() for line in right.lines] == [counts.tolist() for counts in uses]
    every = np.sort(np.concatenate(uses))[::-1]
    assert [int(text.get_text()) for text in left.texts] == every[:72].tolist()
    title = answer.figure.get_suptitle()
    assert f"{expected.n_kernels} kernels, K = {question.n_clusters} (" in title
    assert question.distance in title


@pytest.mark.parametrize("question", QUESTIONS, ids=described)
def test_what_is_announced_before_the_answer_holds_for_the_answer(explorer, question):
    announced = explorer.announced(question)
    facts = asked(explorer, **vars(question)).facts
    assert announced == (
        f"clustering {facts['kernels']} kernels into {facts['representatives']}: removes "
        f"{facts['kernels removed']} of them and {facts['bytes of all convolutions removed']} of the bytes "
        "of all convolutions …"
    )


def test_bytes_removed_are_counted_against_every_convolution_of_the_network(explorer):
    # One layer of 24 kernels, 2 of 36 bytes and 24 bits in their place; 152 kernels and 24 biases in all.
    removed = 100 * (24 * 36 - 2 * 36 - 3) / (152 * 36 + 24 * 4)
    announced = explorer.announced(ClusterQuestion(("0",), "global", 2))
    assert re.findall(r"[\d.]+ %", announced) == [f"{100 * 22 / 24:.3f} %", f"{removed:.2f} %"]


def test_a_sketch_answers_at_once_and_the_clustering_takes_its_place(explorer, monkeypatch):
    gate, fit = Gate(), kmeans.Tree.fit
    monkeypatch.setattr(kmeans.Tree, "fit", lambda *args, **options: gate() or fit(*args, **options))
    explorer.show()
    gate.close()
    explorer.choose(n_clusters=30)
    sketch = explorer.answer
    assert (sketch.question.n_clusters, sketch.is_final) == (30, False)
    assert gate.reached.wait(PATIENCE)
    assert explorer.status == explorer.announced(explorer.question)
    gate.open.set()
    assert explorer.wait(PATIENCE)
    answer = explorer.answer
    assert (explorer.status, answer.question.n_clusters, answer.is_final) == ("", 30, True)
    assert {name: text for name, text in sketch.facts.items() if name != "inertia"} == {
        name: text for name, text in answer.facts.items() if name != "inertia"
    }
    guess, exact = (float(x.facts["inertia"].removeprefix("about ")) for x in (sketch, answer))
    assert guess == pytest.approx(exact, rel=0.2)


def test_a_kept_answer_does_not_wait_for_the_one_under_way(explorer, monkeypatch):
    gate, fit = Gate(), kmeans.Tree.fit
    first = explorer.show()
    monkeypatch.setattr(kmeans.Tree, "fit", lambda *args, **options: gate() or fit(*args, **options))
    gate.close()
    explorer.choose(n_clusters=30)
    assert gate.reached.wait(PATIENCE)
    explorer.choose(n_clusters=20)
    assert explorer.answer == first
    assert explorer.status == ""
    gate.open.set()
    assert explorer.wait(PATIENCE)
    assert explorer.answer == first, "what was under way is dropped"


def test_only_the_last_of_many_moves_is_clustered(explorer, fits, monkeypatch):
    explorer.show()
    fits.clear()
    monkeypatch.setattr(_cluster_explorer, "_REST", 0.5)
    seen = []
    for k in range(2, 30):
        explorer.choose(n_clusters=k)
        seen.append(explorer.answer.question.n_clusters)
    assert seen == list(range(2, 30)), "each is sketched"
    assert explorer.wait(PATIENCE)
    assert fits == [29]
    assert explorer.answer.is_final


def test_a_codebook_beyond_the_leaves_is_sketched_from_the_leaves():
    points = np.random.default_rng(0).normal(size=(8000, 3)).astype(np.float32)
    sketcher = _clusterer.Sketcher.of(points, kmeans.tree(points, leaves=128))
    inertias, most = [], []
    for k in (128, 512, 8000):
        centres, counts, inertia = sketcher.sketch(k)
        assert len(centres) == len(counts) <= k
        inertias.append(inertia)
        most.append(counts.max())
    assert inertias[1] == pytest.approx(kmeans.fit(points, 512).inertia, rel=0.2)
    assert inertias[2] < 0.1 * inertias[0]
    assert most[0] > most[1] > most[2]
    fitted = np.bincount(kmeans.fit(points, 512).labels)
    assert most[1] == pytest.approx(fitted.max(), rel=0.5)


def test_a_sketch_beyond_the_leaves_says_how_many_representatives_there_are(explorer, monkeypatch):
    monkeypatch.setitem(_clusterer._LEAVES, "global", 16)
    explorer.show()
    for k in (40, 41):
        explorer.choose(n_clusters=k)
        assert f"most used of {k} representatives" in explorer.answer.sheet()
        assert explorer.answer.facts["representatives"] == str(k)
    assert explorer.wait(PATIENCE)


def test_the_sheet_shows_the_most_used_representatives_of_all_codebooks(explorer):
    explorer.shown = 12
    answer = asked(explorer, scope="layer")
    expected = expected_clustering(explorer.bank, explorer.question)
    sheet = answer.figure.axes[0]
    assert sheet.get_title() == "the 12 most used of 40 representatives"
    books = [clustering.by_use(group) for group in expected.groups]
    codebook, uses = (np.concatenate(parts) for parts in zip(*books, strict=True))
    most = np.argsort(-uses, kind="stable")[:12]
    assert [int(text.get_text()) for text in sheet.texts] == uses[most].tolist()
    first = np.ma.filled(sheet.images[0].get_array(), np.nan)[:3, :3]
    np.testing.assert_allclose(first, codebook[most[0]] / np.abs(codebook[most]).max(), rtol=1e-6)


def test_one_scale_for_all_shows_which_representatives_are_strong(explorer):
    each, one = (
        np.ma.filled(asked(explorer, colour=colour).figure.axes[0].images[0].get_array(), np.nan)
        for colour in reversed(COLOURS)
    )
    largest = [np.abs(sheet[:3, 4 * i : 4 * i + 3]).max() for sheet in (each, one) for i in range(8)]
    assert largest[:8] == pytest.approx([1] * 8)
    assert len(set(largest[8:])) == 8
    assert np.nanmax(np.abs(one)) == pytest.approx(1)


def test_it_begins_with_every_layer_and_no_more_clusters_than_kernels():
    model = tiny_model()
    assert ClusterExplorer(model).question == ClusterQuestion(
        LAYERS, "global", 64, "euclidean", "one scale for all"
    )
    assert ClusterExplorer(model, n_clusters=1000).question.n_clusters == ALL


def test_as_many_clusters_as_kernels_can_be_asked_for(explorer):
    for layers, scope, largest in (
        (LAYERS, "global", 152), (LAYERS, "layer", 128), (("0",), "global", 24), (("0",), "layer", 24),
    ):  # fmt: skip
        explorer.choose(layers=layers, scope=scope)
        assert explorer.largest == largest
        facts = asked(explorer, n_clusters=largest).facts
        assert (facts["kernels removed"], facts["inertia"]) == ("0.000 %", "0")
        with pytest.raises(InvalidValueError, match=rf"^K is {largest + 1};.* {largest}[.]$"):
            explorer.choose(n_clusters=largest + 1)


def test_k_follows_to_what_other_layers_and_scopes_allow(explorer):
    explorer.choose(n_clusters=150)
    explorer.choose(scope="layer")
    assert explorer.question.n_clusters == 128
    explorer.choose(layers=("0",))
    assert explorer.question.n_clusters == 24
    explorer.choose(layers=LAYERS, scope="global")
    assert explorer.question.n_clusters == 24
    assert answered(explorer).facts["representatives"] == "24"


def test_a_layer_named_twice_counts_once(explorer):
    explorer.choose(layers=("0", "0"))
    assert explorer.largest == 24
    assert "24 kernels" in answered(explorer).figure.get_suptitle()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": ("conv9",)}, InvalidValueError, "no layer 'conv9'"),
        ({"layers": ()}, InvalidValueError, "name at least one"),
        ({"scope": "gobal"}, UnknownNameError, "unknown scope 'gobal'.*mean 'global'"),
        ({"distance": "cosine"}, UnknownNameError, "distance that can be clustered by 'cosine'"),
        ({"colour": "red"}, UnknownNameError, "unknown colour 'red'"),
        ({"n_clusters": 0}, InvalidValueError, "K is 0;"),
        ({"n_clusters": 2.5}, InvalidValueError, "K is 2.5;"),
        ({"layers": ("0",), "n_clusters": 25}, InvalidValueError, "K is 25;"),
    ],
)
def test_what_cannot_be_clustered_is_refused_and_changes_nothing(explorer, changes, error, message):
    before, first, told = explorer.question, explorer.show(), []
    explorer.listeners.append(lambda: told.append(1))
    with pytest.raises(error, match=message):
        explorer.choose(**changes)
    assert (explorer.question, explorer.answer, explorer.status, told) == (before, first, "", [])


def test_kernels_that_cannot_be_turned_are_said_and_keep_the_answer():
    network = nn.Sequential(nn.Conv2d(3, 8, (1, 3)))
    explorer = ClusterExplorer(Model("flat", network, torch.Tensor.float), n_clusters=4)
    first = explorer.show()
    explorer.choose(distance="symmetric")
    assert explorer.wait(PATIENCE)
    assert explorer.answer is first
    assert "square" in explorer.status
    assert not explorer.status.startswith("failed")


def test_colour_draws_again_without_clustering_again(explorer, fits):
    for distance in METHODS:
        pictures = [asked(explorer, distance=distance, colour=colour).figure for colour in COLOURS]
        assert pictures[0] is not pictures[1]
    assert fits == [20, 20, 20]


def test_a_clustering_that_is_asked_for_twice_is_made_once(explorer, fits):
    for changes in (
        {"n_clusters": 8}, {"n_clusters": 16}, {"n_clusters": 8},
        {"layers": ("2",)}, {"distance": "symmetric"}, {"layers": LAYERS},
        {"distance": "euclidean"}, {"layers": ("2",)}, {"distance": "symmetric"},
    ):  # fmt: skip
        asked(explorer, **changes)
    explorer.clustering(explorer.question)
    assert fits == [8, 16, 8, 8, 8]


def test_a_tree_is_made_once_for_each_choice_of_layers(explorer, monkeypatch):
    made, genuine = [], kmeans.tree
    monkeypatch.setattr(
        kmeans, "tree", lambda points, **options: made.append(len(points)) or genuine(points, **options)
    )
    for changes in (
        {"n_clusters": 8}, {"n_clusters": 9}, {"layers": ("0",)}, {"n_clusters": 10}, {"layers": LAYERS},
    ):  # fmt: skip
        asked(explorer, **changes)
    assert made == [152, 24]


@pytest.mark.parametrize(
    ("owner", "name", "changes", "made"),
    [  # the one that is stopped; that of the newer question, if it takes one of its own; the whole one
        (kmeans, "tree", {"n_clusters": 16}, 2),
        (kmeans.Tree, "fit", {"n_clusters": 60}, 3),
        (kmeans_symmetric, "fit", {"n_clusters": 30, "distance": "symmetric"}, 3),
    ],
    ids=["tree", "K of a tree", "symmetric"],
)
def test_a_clustering_stopped_by_a_newer_question_is_made_whole_when_it_is_asked_for_again(
    explorer, monkeypatch, owner, name, changes, made
):
    gate, genuine, steps, ended = Gate(), getattr(owner, name), [], []
    expected = expected_clustering(explorer.bank, replace(explorer.question, **changes))

    def gated(*args, progress=None, **options):
        def hear(step):
            gate()
            steps.append(answer := progress(step))
            return answer

        found = genuine(*args, progress=hear, **options)
        ended.append(1)
        return found

    if owner is kmeans.Tree:
        explorer.show()  # makes the tree
    monkeypatch.setattr(owner, name, gated)
    gate.close()
    explorer.choose(**changes)
    assert gate.reached.wait(PATIENCE)
    explorer.choose(n_clusters=2)
    gate.open.set()
    assert explorer.wait(PATIENCE)
    assert any(steps), "the fit was asked to stop"
    answer = asked(explorer, **changes)
    assert explorer.clustering(answer.question).inertia == expected.inertia
    assert len(ended) == made
    asked(explorer, n_clusters=2)
    asked(explorer, **changes)
    assert len(ended) == made, "and then kept"


def test_a_clustering_can_be_had_before_anything_is_shown(explorer):
    found = contextvars.Context().run(explorer.clustering, explorer.question)
    assert found.inertia == expected_clustering(explorer.bank, explorer.question).inertia


def test_a_question_that_is_answered_and_evaluated_at_once_is_clustered_once(evaluating, fits):
    evaluating.choose(n_clusters=33)
    evaluating.evaluate(50)
    assert evaluating.wait(PATIENCE)
    assert fits == [33]
    assert evaluating.answer.question.n_clusters == evaluating.rows[-1]["k"] == 33


def test_progress_of_a_clustering_is_said_with_the_time_left(explorer, monkeypatch):
    monkeypatch.setattr("kclib.explorers._background._TELL_EVERY", -1.0)
    said = []
    explorer.listeners.append(lambda: said.append(explorer.status))
    asked(explorer, n_clusters=100)
    shares = {
        what: [int(text.split("%")[0].split()[-1]) for text in said if text.startswith(what + " ")]
        for what in ("preparing every K:", "clustering:")
    }
    for found in shares.values():
        assert found == sorted(found)
        assert found[-1] == 100
    texts = [text for text in said if text.startswith("preparing")]
    assert all(re.fullmatch(r"preparing every K: \d+%, about \d\d:\d\d left", text) for text in texts)


def independent_row(explorer, question, n_images, images):
    """Return the numbers of an evaluation without the explorer."""
    data, network = datasets.limited(images, n_images), explorer.model.network
    found = expected_clustering(explorer.bank, question)
    small = Model("small", compression.replaced(network, found), explorer.model.preprocess)
    dense, result = (evaluation.evaluate(m, data, progress=False) for m in (explorer.model, small))
    return byte_counts.removed(network, found) | _accuracy.accuracy(result, dense)


@pytest.mark.parametrize(
    "question", [q for q in QUESTIONS if q.n_clusters in (20, 2)], ids=described
)  # others lose nothing worth measuring
def test_a_row_is_that_of_an_evaluation_made_without_the_explorer(evaluating, question):
    row = evaluated(evaluating, 120, **vars(question))
    expected = independent_row(evaluating, question, 120, evaluating.images)
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert (row["images"], row["k"], row["codebook"], row["distance"]) == (
        120, question.n_clusters, question.scope, question.distance
    )  # fmt: skip
    assert evaluating.evaluated == question
    assert not evaluating.accuracy_is_stale


def test_rows_are_those_of_a_sweep_where_both_keep_every_kernel(evaluating, tmp_path):
    evaluated(evaluating, 120, n_clusters=ALL)
    data = datasets.limited(evaluating.images, 120)
    table = experiments.sweep(evaluating.model, data, [ALL], scopes=["global"], store=Store(tmp_path))
    common = {
        *byte_counts.DENSE,
        *_accuracy.accuracy(*[evaluation.evaluate(evaluating.model, data)] * 2),
        "scope",
        "k",
    }
    common.remove("cluster_seconds")
    for mine, theirs in zip(evaluating.rows, table.to_dict("records"), strict=True):
        assert {name: mine[name] for name in common} == {name: theirs[name] for name in common}
    assert evaluating.table.top1.tolist() == table.top1.tolist()
    assert 80 < table.top1[0] < 100


def test_a_clustering_that_loses_much_is_seen_to(evaluating):
    row = evaluated(evaluating, 200, n_clusters=2)
    assert row["drop"] > 10
    assert row["top1"] == pytest.approx(evaluating.rows[0]["top1"] - row["drop"])


def test_the_dense_row_comes_once_for_each_number_of_images(evaluating):
    for n_images, k in ((50, 8), (50, 9), (80, 9), (50, 10), (80, 11)):
        evaluated(evaluating, n_images, n_clusters=k)
    rows = [(row["images"], row["k"]) for row in evaluating.rows]
    assert rows == [(50, 0), (50, 8), (50, 9), (80, 0), (80, 9), (50, 10), (80, 11)]
    assert [row["scope"] == "dense" for row in evaluating.rows] == [k == 0 for _, k in rows]
    assert evaluating.table.k.tolist() == [k for _, k in rows]


def test_the_dense_model_is_evaluated_once_for_each_number_of_images(evaluating, monkeypatch):
    counted, genuine = [], evaluation.evaluate
    monkeypatch.setattr(
        evaluation,
        "evaluate",
        lambda model, data, **options: counted.append(len(data)) or genuine(model, data, **options),
    )
    for n_images, k in ((50, 8), (50, 9), (80, 9), (80, 10)):
        evaluated(evaluating, n_images, n_clusters=k)
    assert counted == [50, 50, 50, 80, 80, 80]


def stop(evaluating, gate, n_images):
    """Begin an evaluation, and return once its network is at work and waits."""
    gate.close()
    evaluating.evaluate(n_images)
    assert gate.reached.wait(PATIENCE)


def test_a_cancelled_evaluation_leaves_nothing(evaluating, gate):
    asked(evaluating, n_clusters=8)
    stop(evaluating, gate, 200)
    assert evaluating.running.question.n_clusters == 8
    assert evaluating.running.n_images == 200
    evaluating.cancel()
    assert (evaluating.running, evaluating.evaluation_status) == (None, "cancelled")
    gate.open.set()
    assert evaluating.wait(PATIENCE)
    assert (evaluating.running, evaluating.evaluation_status) == (None, "cancelled")
    assert (evaluating.rows, evaluating.evaluated, evaluating.accuracy_is_stale) == ((), None, False)
    assert evaluating.status == ""
    stop(evaluating, gate, 200)
    assert evaluating.evaluation_status == ""
    gate.open.set()
    assert evaluating.wait(PATIENCE)
    assert [row["k"] for row in evaluating.rows] == [0, 8]


def test_an_evaluation_cancelled_after_the_dense_models_still_gives_the_dense_row_the_next_time(
    evaluating, gate
):
    asked(evaluating, n_clusters=8)

    def at_half():
        if evaluating.running and evaluating.running.share > 0.5:
            evaluating.cancel()

    evaluating.listeners.append(at_half)
    evaluating.evaluate(100)
    assert evaluating.wait(PATIENCE)
    assert (evaluating.rows, evaluating.evaluation_status) == ((), "cancelled")
    evaluating.listeners.clear()
    evaluated(evaluating, 100)
    assert [row["k"] for row in evaluating.rows] == [0, 8]
    assert evaluating.rows[-1]["drop"] == pytest.approx(
        independent_row(evaluating, evaluating.question, 100, evaluating.images)["drop"]
    )


def test_a_cancelled_evaluation_ends_at_the_next_batch(evaluating, gate):
    asked(evaluating, n_clusters=8)
    batches = []
    evaluating.model.network[5].call = lambda: (batches.append(1), gate())
    stop(evaluating, gate, 200)
    evaluating.cancel()
    gate.open.set()
    assert evaluating.wait(PATIENCE)
    assert batches == [1], "of four of the dense model, and four more"


def test_nothing_to_cancel_is_no_matter(evaluating):
    evaluating.cancel()
    assert (evaluating.running, evaluating.evaluation_status) == (None, "")
    evaluated(evaluating, 50)
    evaluating.cancel()
    assert evaluating.evaluation_status == ""
    assert len(evaluating.rows) == 2


def test_an_evaluation_takes_the_place_of_one_under_way(evaluating, gate):
    asked(evaluating, n_clusters=8)
    stop(evaluating, gate, 200)
    evaluating.choose(n_clusters=9)
    evaluating.evaluate(50)
    assert (evaluating.running.question.n_clusters, evaluating.running.n_images) == (9, 50)
    gate.open.set()
    assert evaluating.wait(PATIENCE)
    assert [(row["images"], row["k"]) for row in evaluating.rows] == [(50, 0), (50, 9)]
    assert (evaluating.running, evaluating.evaluation_status) == (None, "")


def test_questions_are_answered_while_an_evaluation_is_under_way_and_its_row_is_of_what_was_asked_then(
    evaluating, gate
):
    asked(evaluating, n_clusters=8)
    stop(evaluating, gate, 100)
    evaluating.choose(n_clusters=9)
    assert answered(evaluating).question.n_clusters == 9
    assert evaluating.running.question.n_clusters == 8
    gate.open.set()
    assert evaluating.wait(PATIENCE)
    assert [row["k"] for row in evaluating.rows] == [0, 8]
    assert (evaluating.evaluated.n_clusters, evaluating.accuracy_is_stale) == (8, True)
    asked(evaluating, n_clusters=8)
    assert not evaluating.accuracy_is_stale


def test_accuracy_is_stale_as_soon_as_another_clustering_is_asked_for_and_colour_asks_for_none(evaluating):
    assert not evaluating.accuracy_is_stale
    evaluated(evaluating, 50, n_clusters=8)
    asked(evaluating, colour=COLOURS[1])
    assert not evaluating.accuracy_is_stale
    for changes in ({"n_clusters": 9}, {"distance": "symmetric"}, {"scope": "layer"}, {"layers": ("2",)}):
        before = {name: getattr(evaluating.question, name) for name in changes}
        evaluating.choose(**changes)
        assert evaluating.accuracy_is_stale
        evaluating.choose(**before)
        assert not evaluating.accuracy_is_stale
    evaluated(evaluating, 50, n_clusters=9)
    assert not evaluating.accuracy_is_stale
    assert evaluating.wait(PATIENCE)


def test_a_failing_evaluation_says_so_and_keeps_the_rows(evaluating, gate, capsys, monkeypatch):
    evaluated(evaluating, 50, n_clusters=8)
    rows = evaluating.rows

    def broken():
        raise OSError("no such device")

    evaluating.model.network[5].call = broken
    evaluating.choose(n_clusters=9)
    evaluating.evaluate(50)
    assert evaluating.wait(PATIENCE)
    assert "OSError in test_cluster_explorer.py" in evaluating.evaluation_status
    assert "no such device" in evaluating.evaluation_status
    assert (evaluating.rows, evaluating.running, evaluating.status) == (rows, None, "")
    with monkeypatch.context() as patch:  # what nobody foresaw
        patch.setattr("kclib.evaluation.evaluate", lambda *_, **__: broken())
        evaluating.evaluate(50)
        assert evaluating.wait(PATIENCE)
    assert evaluating.evaluation_status == "failed: OSError: no such device"
    assert "Traceback" in capsys.readouterr().err
    evaluating.model.network[5].call = lambda: gate()
    evaluated(evaluating, 50)
    assert [row["k"] for row in evaluating.rows] == [0, 8, 9]


def test_an_evaluation_of_images_of_other_classes_says_so_in_its_own_sentence(evaluating):
    object.__setattr__(evaluating.model, "classes", ("x", "y"))
    evaluating.evaluate(50)
    assert evaluating.wait(PATIENCE)
    assert evaluating.evaluation_status.startswith("the network has 16 outputs and 2 names")
    assert evaluating.rows == ()


def test_the_share_done_rises_to_one_and_through_a_half_when_the_dense_model_comes_first(evaluating):
    shares = []
    evaluating.listeners.append(lambda: evaluating.running and shares.append(evaluating.running.share))
    evaluated(evaluating, 200)
    assert shares == pytest.approx([0, 0.16, 0.32, 0.48, 0.5, 0.66, 0.82, 0.98, 1])  # batches of 64 images
    shares.clear()
    evaluated(evaluating, 200, n_clusters=8)
    assert [share for share in shares if share] == pytest.approx([0.32, 0.64, 0.96, 1])
    assert shares == sorted(shares)


def test_time_left_is_what_is_left_at_the_pace_so_far(monkeypatch):
    monkeypatch.setattr(_cluster_explorer, "time", SimpleNamespace(monotonic=lambda: 1010.0))
    question = ClusterQuestion(LAYERS)
    assert math.isnan(Running(question, 100, 0.0, 1000.0).seconds_left)
    assert Running(question, 100, 0.25, 1000.0).seconds_left == 30
    assert Running(question, 100, 1.0, 1000.0).seconds_left == 0


def test_time_left_counts_from_the_first_image_and_not_from_the_clustering(evaluating, monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(_cluster_explorer, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    fit = kmeans.Tree.fit

    def slow(*args, **options):
        now.seconds += 500
        return fit(*args, **options)

    monkeypatch.setattr(kmeans.Tree, "fit", slow)
    evaluating.model.network[5].call = lambda: setattr(now, "seconds", now.seconds + 10)
    left = []
    evaluating.listeners.append(lambda: evaluating.running and left.append(evaluating.running.seconds_left))
    evaluated(evaluating, 128)
    # two batches of the dense model and two more, ten seconds each
    assert left[1:] == pytest.approx([30, 20, 10, 0])
    assert math.isnan(left[0])


def test_without_images_accuracy_cannot_be_asked_for(explorer):
    with pytest.raises(InvalidValueError, match="no images; give it some"):
        explorer.evaluate(10)
    assert (explorer.running, explorer.rows) == (None, ())


@pytest.mark.parametrize("n_images", [0, -1, 201])
def test_a_number_of_images_that_there_are_not_is_refused(evaluating, gate, n_images):
    told = []
    evaluating.listeners.append(lambda: told.append(1))
    with pytest.raises(InvalidValueError, match=f"limit of tiny/test is {n_images};"):
        evaluating.evaluate(n_images)
    assert (evaluating.running, evaluating.rows, told) == (None, (), [])
    stop(evaluating, gate, 50)
    with pytest.raises(InvalidValueError, match=f"limit of tiny/test is {n_images}"):
        evaluating.evaluate(n_images)
    gate.open.set()
    assert evaluating.wait(PATIENCE)
    assert len(evaluating.rows) == 2, "the one under way went on"


def test_choices_from_many_threads_during_evaluations_end_with_the_last_questions_own_answer(evaluating):
    start, failures = threading.Barrier(8), []

    def act(i):
        try:
            start.wait(PATIENCE)
            for j in range(6):
                k = 2 + (7 * i + 3 * j) % 20
                evaluating.choose(n_clusters=k, layers=(LAYERS, ("0",), ("2",))[(i + j) % 3])
                if i == 0:
                    evaluating.evaluate(20 + j)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=act, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert failures == []
    assert evaluating.wait(PATIENCE)
    assert evaluating.answer.question == evaluating.question
    assert (evaluating.status, evaluating.running, evaluating.evaluation_status) == ("", None, "")
    assert evaluating.rows[-1]["images"] == 25
    expected = expected_clustering(evaluating.bank, evaluating.question)
    assert evaluating.answer.facts["inertia"] == f"{expected.inertia:.4g}"


def test_the_network_is_left_as_it_was(evaluating):
    before = {name: value.clone() for name, value in evaluating.model.network.state_dict().items()}
    evaluated(evaluating, 50, n_clusters=2)
    after = evaluating.model.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
