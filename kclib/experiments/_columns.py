"""Columns of text that tables for readers share."""

import pandas as pd

_VARIED = ("model", "data", "method", "seed")
_CODEBOOKS = {"dense": "dense", "layer": "a layer", "global": "for all"}


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
