"""The results of sweeps as text for readers."""

import pandas as pd

from kclib.experiments import _columns


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of a sweep (`_cell.Subject.table`, of any models and data sets) as text for readers.

    What matters comes first: the drop, with its paired 95 % interval. ``p`` is that of McNemar's exact test.
    """
    clustered = table.scope != "dense"
    columns = {
        "clustering": _columns.clusterings(table),
        "drop (points)": drops(table),
        **_columns.varied(table),
        "kernels removed (%)": table.kernels_removed.map(_share),
        "bytes removed (%)": table.bytes_removed.map(_share),
        "top-1 (%)": table.top1.map("{:.2f}".format),
        "top-5 (%)": table.top5.map("{:.2f}".format),
        "p": _columns.p_values(table.p_value),
        "representatives": table.clusters.map("{:,.0f}".format).where(clustered, "–"),
        "bytes removed, fp16 codebook (%)": table.bytes_removed_fp16.map(_share),
        "bytes removed, whole model (%)": table.model_bytes_removed.map(_share),
        "seconds": (table.cluster_seconds + table.evaluate_seconds).map("{:.0f}".format),
    }
    return pd.DataFrame(columns)


def drops(table: pd.DataFrame, name: str = "drop") -> list[str]:
    """Return points with their interval, ``name_low`` to ``name_high``, as text."""
    spans = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
    return [f"{points:.2f} [{low:.2f}, {high:.2f}]" for points, low, high in spans]


def _share(percent: float) -> str:
    """Return percent as text of two decimals; what is below 100 stays so."""
    return "> 99.99" if 99.995 <= percent < 100 else f"{percent:.2f}"


def pruned(share: float, what: str) -> str:
    """Return which share of kernels, filters or weights was pruned as text."""
    return f"{100 * share:.0f} % of the {what} pruned" if share else "nothing pruned"


def in_bytes(n_bytes: float) -> str:
    """Return bytes as text: in megabytes, or in kilobytes or bytes where they are few."""
    if n_bytes < 1e3:
        return f"{n_bytes:.0f} bytes"
    return f"{n_bytes / 1e3:.1f} kB" if n_bytes < 1e5 else f"{n_bytes / 1e6:.2f} MB"
