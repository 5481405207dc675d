import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from statsmodels.formula.api import ols
from torch import nn

from kclib import evaluation
from kclib.combination import Cluster, Prune, Quantize, Train, _pipeline, _pruning, factorial, orthogonality
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.evaluation import _accuracy, _intervals
from kclib.models import Model
from kclib.store import Store
from kclib.training import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = {"sparsities": (0, 0.5), "clusters": (None, 4), "precisions": (None, "int4"), "seeds": (0, 1)}


def tiny_model(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return Model("tiny", network.eval(), lambda images: images.float() / 255 - 0.5)


def tiny_data():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 3, 1, 1), dtype=torch.uint8, generator=draw).expand(60, 3, 8, 8)
    labels = tiny_model().network(images / 255 - 0.5).argmax(1)
    labels[:8] = 5
    return ImageSet("tiny/test", images, labels, tuple("abcdef"), "0")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


def run(store, orders=factorial.ORDERS, **options):
    wanted = factorial.cells(orders=orders, **LEVELS)
    return factorial.run(tiny_model(), tiny_data(), wanted, store=store, progress=False, **options)


@pytest.fixture(scope="module")
def table(store):
    return run(store)


@pytest.fixture
def counted(monkeypatch):
    """Counts evaluations and clusterings; after `limit` evaluations the next is interrupted."""
    calls = {"evaluate": 0, "cluster": 0, "limit": 1000}

    def count(module, name):
        genuine = getattr(module, name)

        def called(*args, **options):
            if calls[name] == calls["limit"]:
                raise InterruptedError
            calls[name] += 1
            return genuine(*args, **options)

        monkeypatch.setattr(module, name, called)

    count(evaluation, "evaluate")
    count(_pipeline, "cluster")
    return calls


def test_a_cells_pipeline_makes_the_network_that_was_evaluated(table):
    cells = factorial.cells(orders=factorial.ORDERS, **LEVELS)
    for cell, (_, row) in zip(cells, table.iterrows(), strict=True):
        assert factorial.pipeline(row) == factorial.pipeline(cell)
        found = factorial.pipeline(row).run(tiny_model(), seed=cell["seed"] or 0, progress=False)
        assert found.n_bytes == row.bytes
        made = Model("tiny", found.model.network, tiny_model().preprocess)
        answers = evaluation.evaluate(made, tiny_data(), progress=False)
        assert np.packbits(answers.correct).tobytes() == row.right


def test_training_is_told_beside_what_was_lost_without_it_and_resumes(table, tmp_path, monkeypatch):
    some, recipe = table[table.clustering == "4 layer"].tail(2), Recipe(2, batch_size=20, held_back=20)
    given = tiny_model(), tiny_data(), some, tiny_data(), tmp_path
    found = factorial.trained(*given, recipe=recipe, progress=False)
    assert found.untrained.tolist() == some["drop"].tolist()
    assert found.bytes.tolist() == some.bytes.tolist()
    steps = factorial.pipeline(some.iloc[0]) >> Train(recipe)
    options = {"train": tiny_data(), "folder": tmp_path / "other", "progress": False}
    by_hand = steps.run(tiny_model(), seed=int(some.seed.iloc[0]), **options)
    made = Model("tiny", by_hand.model.network, tiny_model().preprocess)
    top1 = evaluation.evaluate(made, tiny_data(), progress=False).top1.estimate
    assert found.top1.iloc[0] == top1
    monkeypatch.delattr(torch.optim.AdamW, "step")  # all epochs are there
    pd.testing.assert_frame_equal(factorial.trained(*given, recipe=recipe, progress=False), found)


def test_every_cell_is_there_once_and_what_does_not_matter_is_none():
    found = factorial.cells()
    assert len(found) == 4 * 4 * (1 + 3 * 2 * 3) == len({tuple(cell.values()) for cell in found})
    both = factorial.cells(orders=factorial.ORDERS)
    assert len(both) == len(found) + 3 * 4 * 3 * 2 * 3
    for cell in both:
        assert (cell["clusters"] is None) == (cell["scope"] is None) == (cell["seed"] is None)
        assert (cell["order"] is None) == (cell["clusters"] is None or cell["sparsity"] == 0)
        assert cell["pruned"] == (None if cell["sparsity"] == 0 else "kernels")
    nothing = dict.fromkeys(("pruned", "clusters", "scope", "precision", "order", "seed"))
    assert factorial.cells((0,), (None,), precisions=(None,)) == [nothing | {"sparsity": 0}]
    three = factorial.cells((0, 0.5), (None, 4), ("layer",), (None,), seeds=(0,), pruned=_pruning.KINDS)
    assert [(x["pruned"], x["clusters"]) for x in three] == [
        (None, None), (None, 4), *((kind, k) for kind in _pruning.KINDS for k in (None, 4))
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match="kind of pruning 'layers'"):
        factorial.cells(pruned=("layers",))
    with pytest.raises(UnknownNameError, match="order"):
        factorial.cells(orders=("cluster last",))


@pytest.mark.parametrize("order", factorial.ORDERS)
def test_a_row_is_what_the_pipeline_of_its_steps_makes(table, order):
    steps = [Prune(0.5), Cluster(4, "global")]
    steps = steps if order == "prune first" else steps[::-1]
    found = (steps[0] >> steps[1] >> Quantize("int4")).run(tiny_model(), seed=1, progress=False)
    (row,) = table.query(
        "sparsity == 0.5 and clustering == '4 global' and precision == 'int4' and seed == 1"
        " and order == @order"
    ).itertuples()
    model = tiny_model()
    before = evaluation.evaluate(model, tiny_data(), progress=False)
    after = evaluation.evaluate(
        Model("small", found.model.network, model.preprocess), tiny_data(), progress=False
    )
    lost = evaluation.drop(before, after)
    assert (row.bytes, row.top1, row.drop) == (found.n_bytes, after.top1.estimate, lost.points.estimate)
    assert (row.drop_low, row.drop_high, row.images) == (lost.points.low, lost.points.high, 60)
    assert np.unpackbits(np.frombuffer(row.right, np.uint8), count=60).tolist() == after.correct.tolist()
    assert row.ratio == (36 * 36 + 10 * 4) / row.bytes


def test_the_dense_cell_loses_nothing_and_cells_that_are_not_clustered_are_there_once(table):
    dense = table.iloc[0]
    assert (dense.clustering, dense.precision, dense.order, dense["drop"], dense.ratio) == (
        "none", "none", "none", 0, 1,
    )  # fmt: skip
    assert dense[["clusters", "seed"]].isna().all()
    assert len(table) == 2 * 2 + 2 * 2 * 2 + 2 * 2 * 2 * 2
    assert table["drop"].nunique() > 4


def test_what_was_evaluated_is_looked_up_and_what_was_interrupted_goes_on(table, counted, tmp_path):
    pd.testing.assert_frame_equal(run(Store(tmp_path), n_jobs=3), table)
    n_cells, n_clusterings = len(table), 2 * 2 + 2 * 2 * 1  # cluster first: those of no pruning apart
    assert counted["evaluate"] == n_cells
    assert n_clusterings <= counted["cluster"] < n_cells
    counted |= {"evaluate": 0, "cluster": 0}
    pd.testing.assert_frame_equal(run(Store(tmp_path)), table)
    assert (counted["evaluate"], counted["cluster"]) == (0, 0)
    counted["limit"] = 5
    with pytest.raises(InterruptedError):
        run(Store(tmp_path / "other"))
    counted |= {"evaluate": 0, "cluster": 0, "limit": 1000}
    pd.testing.assert_frame_equal(run(Store(tmp_path / "other")), table)
    assert counted["evaluate"] == n_cells - 5


def test_precisions_share_one_clustering(counted, tmp_path):
    cells = factorial.cells((0,), (4,), ("layer",), (None, "fp16", "int8", "int4"), seeds=(7,))
    factorial.run(tiny_model(), tiny_data(), cells, store=Store(tmp_path), progress=False)
    assert (counted["evaluate"], counted["cluster"]) == (5, 1)  # the dense model is the fifth


def test_another_model_is_another_cell(store, counted):
    cells = factorial.cells((0,), (None,), precisions=(None,))
    factorial.run(tiny_model(1), tiny_data(), cells, store=store, progress=False)
    assert counted["evaluate"] == 1


SPARSITY = {0.0: -4.0, 0.3: 0.0, 0.5: 1.0, 0.7: 3.0}
CLUSTERING = {"none": -3.0, "64 layer": 2.0, "256 layer": 1.0}
PRECISION = {"none": -1.0, "int4": 1.0}


def synthetic(together=0.0, noise=0.0, seeds=2):
    """Return a table of 12 points lost on average; most pruning and 64 clusters lose `together` more."""
    draw, rows = np.random.default_rng(0), []
    for sparsity, found, precision, seed in itertools.product(SPARSITY, CLUSTERING, PRECISION, range(seeds)):
        drop = 12 + SPARSITY[sparsity] + CLUSTERING[found] + PRECISION[precision] + noise * draw.normal()
        drop += together * (sparsity == 0.7 and found == "64 layer")
        kind = "kernels" if sparsity else "none"
        rows.append((kind, sparsity, found, precision, "none", seed, drop, 90 - drop, 1000))
    names = ["pruned", "sparsity", "clustering", "precision", "order", "seed", "drop", "top1", "images"]
    return pd.DataFrame(rows, columns=names)


def test_effects_are_those_of_each_kind_of_pruning_with_what_is_not_pruned():
    kernels, filters = synthetic(noise=0.1), synthetic(together=5, noise=0.2)
    filters = filters[filters.pruned != "none"].assign(pruned="filters")
    found = orthogonality.effects(pd.concat([kernels, filters], ignore_index=True))
    assert list(found) == ["pruned", "term", "level", "effect", "low", "high", "share"]
    dense = kernels[kernels.pruned == "none"]
    for kind, table in (("kernels", kernels), ("filters", pd.concat([dense, filters]))):
        expected = orthogonality.effects(table.assign(pruned=kind))
        mine = found[found.pruned == kind].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, expected)
        assert (mine.share[mine.term == "sparsity:clustering"] > 0.01).all() == (kind == "filters")


def test_effects_that_add_up_are_found_and_no_interaction():
    found = orthogonality.effects(synthetic(noise=1e-6)).set_index(["term", "level"])
    assert found.effect["mean", ""] == pytest.approx(12, abs=1e-5)
    for term, expected in (("sparsity", SPARSITY), ("clustering", CLUSTERING), ("precision", PRECISION)):
        for level, effect in expected.items():
            word = level if isinstance(level, str) else f"{level:g}"
            assert found.effect[term, word] == pytest.approx(effect, abs=1e-5)
    pairs = found[found.index.get_level_values("term").str.contains(":")]
    assert len(pairs) == 4 * 3 + 4 * 2 + 3 * 2
    np.testing.assert_allclose(pairs.effect, 0, atol=1e-5)
    squares = {"sparsity": 26 / 4, "clustering": 14 / 3, "precision": 1}
    for term, square in squares.items():
        assert found.share[term].iloc[0] == pytest.approx(square / sum(squares.values()), abs=1e-6)
    assert found.share.groupby("term").first().sum() == pytest.approx(1)
    assert found.index.get_level_values("level")[1:5].tolist() == ["0", "0.3", "0.5", "0.7"]


def test_an_interaction_is_found_where_it_is():
    found = orthogonality.effects(synthetic(together=6, noise=0.2, seeds=4)).set_index(["term", "level"])
    effect, low, high = found.loc[("sparsity:clustering", "0.7 : 64 layer"), ["effect", "low", "high"]]
    assert effect == pytest.approx(6 * (1 - 1 / 4) * (1 - 1 / 3), abs=0.1)
    assert low < effect < high
    assert low > 0
    others = found.loc[["sparsity:precision", "clustering:precision"]]
    assert (others.low < 0.05).all()
    assert (others.high > -0.05).all()


def test_effects_and_intervals_are_those_of_sum_coded_least_squares():
    table = synthetic(noise=1.0).drop(index=[3, 8, 20])  # of uneven numbers of rows
    found = orthogonality.effects(table).set_index(["term", "level"])
    frame = table.assign(clusters=pd.Categorical(table.clustering, list(CLUSTERING)), lost=table["drop"],
                         bits=pd.Categorical(table.precision, list(PRECISION)))  # fmt: skip
    fit = ols("lost ~ (C(sparsity, Sum) + C(clusters, Sum) + C(bits, Sum)) ** 2", frame).fit()
    ends = fit.conf_int()
    rest = "C(clusters, Sum) * C(bits, Sum)"
    without, alone = (ols(f"lost ~ {x}{rest}", frame).fit().ssr for x in ("", "C(sparsity, Sum) + "))
    share = found.share.groupby("term").first()
    assert share["sparsity"] / share["residual"] == pytest.approx((without - alone) / fit.ssr)
    for term, level, name in (
        ("sparsity", "0.3", "C(sparsity, Sum)[S.0.3]"),
        ("clustering", "64 layer", "C(clusters, Sum)[S.64 layer]"),
        ("clustering:precision", "64 layer : none", "C(clusters, Sum)[S.64 layer]:C(bits, Sum)[S.none]"),
    ):
        row = found.loc[(term, level)]
        np.testing.assert_allclose(
            row[["effect", "low", "high"]].astype(float), [fit.params[name], *ends.loc[name]]
        )


def test_odds_that_multiply_add_up_as_logits_and_not_as_points():
    table = synthetic(seeds=1)
    logits = 3 - table["drop"] / 3
    table["images"] = 10**9
    table["top1"] = 100 / (1 + np.exp(-logits))
    table["drop"] = table.top1.max() - table.top1
    odds, points = (orthogonality.effects(table, x).set_index(["term", "level"]) for x in ("logit", "drop"))
    assert odds.effect["sparsity", "0.7"] == pytest.approx(-1, abs=1e-6)
    np.testing.assert_allclose(odds.effect["sparsity:clustering"], 0, atol=1e-6)
    assert abs(points.effect["sparsity:clustering"]).max() > 1
    none = orthogonality.effects(table.assign(top1=np.where(table.sparsity == 0.7, 0, table.top1)), "logit")
    assert np.isfinite(none.effect.dropna()).all()


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (
            lambda x: x.assign(order=["prune first", "cluster first"] * 24),
            "has the orders cluster first, prune",
        ),
        (lambda x: x[(x.sparsity != 0.3) | (x.precision != "int4")], "has 21 of 24 combinations"),
        (
            lambda x: x[x.precision == "none"].drop_duplicates(["sparsity", "clustering"]),
            "12 rows are too few for 12",
        ),
        (lambda x: x[:1], "no method has several levels"),
    ],
)
def test_tables_that_say_nothing_of_effects_are_refused(broken, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        orthogonality.effects(broken(synthetic()))
    with pytest.raises(UnknownNameError, match="response"):
        orthogonality.effects(synthetic(), "top1")


def answered(sparsity, found, precision, right, order="none", pruned="kernels", seed=0):
    right = np.asarray(right, bool)
    cell = {"sparsity": sparsity, "clustering": found, "precision": precision, "order": order}
    cell |= {"pruned": pruned if sparsity else "none", "seed": seed}
    bits = np.packbits(right).tobytes()
    return cell | {"images": len(right), "right": bits, "drop": 100 - 100 * right.mean()}


def wrong(*images):
    return [i not in images for i in range(10)]


ALONE = [
    answered(0.0, "none", "none", wrong()),
    answered(0.5, "none", "none", wrong(0)),
    answered(0.0, "4 layer", "none", wrong(1, 2)),
    answered(0.0, "4 layer", "none", wrong(1)),
    answered(0.0, "none", "int4", wrong(3)),
]


def test_losses_of_different_images_are_as_predicted_and_have_no_excess():
    both = answered(0.5, "4 layer", "none", wrong(0, 1, 2)), answered(0.5, "4 layer", "none", wrong(0, 1))
    (row,) = orthogonality.orthogonality(pd.DataFrame([*ALONE, *both])).to_dict("records")
    assert (row["clustering"], row["seeds"]) == ("4 layer", 2)
    assert (row["drop"], row["predicted"]) == pytest.approx((25, 25))
    assert row["excess"] == pytest.approx(0, abs=1e-12)
    # No image differs, but ten are few: of 2 methods, each may differ by 2. 2 z² / (n + z²) is 0.555
    assert (row["low"], row["high"]) == pytest.approx((-55.5066, 55.5066), abs=1e-3)


def test_what_is_lost_beyond_the_sum_is_the_excess_with_its_paired_interval():
    every = answered(0.5, "4 layer", "int4", wrong(0, 1, 2, 3, 4, 5, 6), "prune first")
    pair = answered(0.5, "none", "int4", wrong(0))
    found = orthogonality.orthogonality(pd.DataFrame([*ALONE, every, pair])).set_index("clustering")
    row = found.loc["4 layer"]
    assert (row["drop"], row.predicted, row.excess) == pytest.approx((70, 10 + 15 + 10, 35))
    excess = np.array([0, 0, 0.5, 0, 1, 1, 1, 0, 0, 0])
    ends = _intervals.of_mean(*np.unique(excess, return_counts=True), -3, 3)
    assert (row.low, row.high) == pytest.approx((100 * ends[0], 100 * ends[1]))
    assert row.order == "prune first"
    assert found.loc["none", "excess"] == pytest.approx(-10)


def test_orders_are_compared_in_pairs_of_the_same_combination():
    rows = [
        answered(0.5, "4 layer", "int4", wrong(0, 1), "prune first"),
        answered(0.5, "4 layer", "int4", wrong(0, 2, 3, 4), "cluster first"),
        answered(0.5, "4 global", "none", wrong(0), "prune first"),  # is not there the other way round
        answered(0.5, "4 layer", "int4", wrong(5, 6, 7), "prune first", seed=1),  # nor is this seed
    ]
    found = orthogonality.orders(pd.DataFrame([*ALONE, *rows]))
    (row,) = found.to_dict("records")
    cell = [row[x] for x in ("pruned", "sparsity", "clustering", "precision")]
    assert cell == ["kernels", 0.5, "4 layer", "int4"]
    assert (row["prune first"], row["cluster first"], row["difference"]) == pytest.approx((20, 40, -20))
    # 1 image is lost by pruning first alone and 3 by clustering first alone
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(_paired(lost=1, won=3, images=10))
    assert orthogonality.orders(pd.DataFrame(ALONE)).empty


def _paired(lost, won, images):
    lost = np.arange(images) < lost
    won = np.arange(images) >= images - won
    points = _accuracy.paired(~won, ~lost).points
    return points.low, points.high


def test_the_sum_is_of_what_the_kind_of_pruning_loses_alone():
    filters = [
        answered(0.5, "none", "none", wrong(0, 4, 5, 6), pruned="filters"),
        answered(0.5, "none", "int4", wrong(0, 3, 4, 5, 6, 7), pruned="filters"),
    ]
    kernels = answered(0.5, "none", "int4", wrong(0, 3))
    found = orthogonality.orthogonality(pd.DataFrame([*ALONE, kernels, *filters])).set_index("pruned")
    assert found.loc["kernels", ["drop", "predicted", "excess"]].tolist() == pytest.approx([20, 20, 0])
    assert found.loc["filters", ["drop", "predicted", "excess"]].tolist() == pytest.approx([60, 50, 10])
    with pytest.raises(InvalidValueError, match=r"no row of .*'pruned': 'filters'"):
        orthogonality.orthogonality(pd.DataFrame([*ALONE, kernels, filters[1]]))


@pytest.mark.parametrize("kind", _pruning.KINDS)
def test_each_kind_of_pruning_has_its_rows_bytes_and_pipeline(kind, store):
    cells = factorial.cells((0, 0.5), (None, 4), ("layer",), (None, "int8"), seeds=(0,), pruned=(kind,))
    found = factorial.run(tiny_model(), tiny_data(), cells, store=store, progress=False)
    assert found.pruned.tolist() == ["none"] * 4 + [kind] * 4
    alone = found[(found.sparsity > 0) & (found.clustering == "none")].set_index("precision")
    for row in alone.itertuples():
        assert factorial.pipeline({**cells[4], "precision": row.Index}).steps[0] == Prune(0.5, kind)
    # Half of 36 kernels, 10 filters or 324 weights are zero; biases, masks' entropies and scales come on top.
    small = _pruning.prune(tiny_model(), 0.5, kind=kind)
    n_kept = sum(int(np.count_nonzero(mask)) for mask in small.masks.values())
    masks = _pruning.sparse_bytes(small.network, kind=kind, precision="fp32") - 4 * n_kept - 4 * 10
    assert alone.bytes["none"] == 4 * (n_kept + 10) + masks
    assert alone.bytes["int8"] == n_kept + 2 * 10 + 4 * 10 + masks
    steps = Prune(0.5, kind) >> Cluster(4, "layer") >> Quantize("int8")
    both = found[(found.sparsity > 0) & (found.precision == "int8") & (found.clustering != "none")]
    assert both.bytes.tolist() == [steps.run(tiny_model(), progress=False).n_bytes]


def test_a_sum_needs_its_parts(table):
    with pytest.raises(InvalidValueError, match=r"no row of {'sparsity': 0.5, 'clustering': 'none'"):
        orthogonality.orthogonality(table[(table.sparsity == 0) | (table.clustering != "none")])
    with pytest.raises(InvalidValueError, match=r"no row of {'sparsity': 0.0, 'clustering': 'none'"):
        orthogonality.orthogonality(table[1:])
    assert len(orthogonality.orthogonality(table)) == 1 + 2 * (1 + 2 + 2)


def test_effects_without_a_rest_have_no_interval_and_none_passes_100_points():
    def table(losses):
        cells = [(s, c, p) for s in (0.0, 0.5) for c in ("none", "4 layer") for p in ("none", "int4")]
        rows = [(*cell, "none", loss, 90 - loss, 10) for cell, loss in zip(cells, losses, strict=True)]
        names = ["sparsity", "clustering", "precision", "order", "drop", "top1", "images"]
        return pd.DataFrame(rows, columns=names).assign(pruned="kernels")

    nothing = orthogonality.effects(table([0.0] * 8)).set_index("term").drop("residual")
    assert nothing.low.isna().all()
    assert (nothing.effect.abs() < 1e-9).all()
    wild = orthogonality.effects(table([0.0, 90, 0, 0, 90, 0, 0, 90])).set_index("term").drop("residual")
    assert wild.low.min() == -100
    assert wild.high.max() == 100
