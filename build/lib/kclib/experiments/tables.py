"""The results of sweeps as text for readers."""

import pandas as pd

_VARIED = ("model", "data", "method", "seed")
_CODEBOOKS = {"dense": "dense", "layer": "a layer", "global": "for all"}


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of a sweep (`_cell.Subject.table`, of any models and data sets) as text for readers.

    Drops have their paired 95 % interval; ``p`` is that of McNemar's exact test.
    """
    clustered = table.scope != "dense"
    spans = zip(table["drop"], table.drop_low, table.drop_high, strict=True)
    columns = named(table) | {
        "representatives": table.clusters.map("{:,.0f}".format).where(clustered, "–"),
        "kernels removed (%)": table.kernels_removed.map("{:.3f}".format),
        "bytes removed (%)": table.bytes_removed.map("{:.2f}".format),
        "with fp16 codebook (%)": table.bytes_removed_fp16.map("{:.2f}".format),
        "of the whole model (%)": table.model_bytes_removed.map("{:.2f}".format),
        "top-1 (%)": table.top1.map("{:.2f}".format),
        "top-5 (%)": table.top5.map("{:.2f}".format),
        "drop (points)": [f"{drop:.2f} [{low:.2f}, {high:.2f}]" for drop, low, high in spans],
        "p": p_values(table.p_value),
        "seconds": (table.cluster_seconds + table.evaluate_seconds).map("{:.0f}".format),
    }
    return pd.DataFrame(columns)


def named(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Return what names the cells of a sweep as columns of text.

    Models, data sets, methods and seeds have a column where there are several.
    """
    clustered = table.scope != "dense"
    several = [name for name in _VARIED if name in table and len(set(table.loc[clustered, name])) > 1]
    return {name: table[name].map(str) for name in several} | {
        "codebook": table.scope.map(_CODEBOOKS),
        "K": table.k.map("{:,}".format).where(clustered, "–"),
    }


def p_values(values: pd.Series) -> pd.Series:
    """Return p-values as text of three decimals; what has none is a dash."""
    return values.map("{:.3f}".format, na_action="ignore").replace("0.000", "< 0.001").fillna("–")


def in_bytes(n_bytes: float) -> str:
    """Return bytes as text: in megabytes, or in kilobytes or bytes where they are few."""
    if n_bytes < 1e3:
        return f"{n_bytes:.0f} bytes"
    return f"{n_bytes / 1e3:.1f} kB" if n_bytes < 1e5 else f"{n_bytes / 1e6:.2f} MB"
