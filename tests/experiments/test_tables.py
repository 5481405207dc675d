import pandas as pd

from kclib.experiments import tables


def test_a_table_for_readers_opens_with_the_drop_and_names_what_varies():
    row = {
        "model": "a", "data": "b", "scope": "global", "k": 4096, "clusters": 4096, "method": "plain",
        "seed": 0, "top5": 99.55,
        "kernels_removed": 99.9996, "bytes_removed": 95.556, "bytes_removed_fp16": 95.68,
        "model_bytes_removed": 95.5, "top1": 85.3, "drop": 8.85, "drop_low": 7.38, "drop_high": 10.32,
        "p_value": 1e-9, "cluster_seconds": 1.2, "evaluate_seconds": 5.6,
    }  # fmt: skip
    dense = row | {"scope": "dense", "method": "dense", "k": 0, "drop": 0.0, "p_value": 1.0}
    one = tables.readable(pd.DataFrame([dense, row]))
    assert one.columns[:2].tolist() == ["clustering", "drop (points)"]
    assert one.clustering.tolist() == ["dense", "4,096 for all"]
    assert one["drop (points)"].tolist()[1] == "8.85 [7.38, 10.32]"
    assert one["kernels removed (%)"].tolist()[1] == "> 99.99", "not all of them"
    assert one["bytes removed (%)"].tolist()[1] == "95.56"
    assert one.p.tolist() == ["1.000", "<\N{NO-BREAK SPACE}0.001"]
    assert one.seconds.tolist() == ["7", "7"]
    two = tables.readable(pd.DataFrame([dense, row, row | {"method": "turned", "scope": "layer"}]))
    first, second, *rest = one.columns
    assert two.columns.tolist() == [first, second, "method", *rest]
    assert two.clustering.tolist()[2] == "4,096 a layer"


def test_bytes_are_told_in_a_unit_that_leaves_digits():
    told = [tables.in_bytes(n) for n in (0, 66, 999, 10_288, 99_940, 239_000, 58_880_000)]
    assert told == ["0 bytes", "66 bytes", "999 bytes", "10.3 kB", "99.9 kB", "0.24 MB", "58.88 MB"]


def test_what_is_pruned_is_said_or_that_nothing_is():
    assert tables.pruned(0.5, "kernels") == "50 % of the kernels pruned"
    assert tables.pruned(0, "none") == "nothing pruned"
