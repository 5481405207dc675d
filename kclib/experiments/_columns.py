"""Columns of text that tables for readers share."""

import pandas as pd

_VARIED = ("model", "data", "method", "seed")
_CODEBOOKS = {"layer": "a layer", "global": "for all"}


def clusterings(table: pd.DataFrame) -> pd.Series:
    """Return K and what shares a codebook, of each cell of a sweep, as text."""
    clustered = table.scope != "dense"
    return (table.k.map("{:,} ".format) + table.scope.map(_CODEBOOKS)).where(clustered, "dense")


def varied(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Return models, data sets, methods and seeds as columns of text, where there are several."""
    clustered = table.scope != "dense"
    several = [name for name in _VARIED if name in table and len(set(table.loc[clustered, name])) > 1]
    return {name: table[name].map(str) for name in several}


def p_values(values: pd.Series) -> pd.Series:
    """Return p-values as text of three decimals; what has none is a dash."""
    return (
        values.map("{:.3f}".format, na_action="ignore")
        .replace("0.000", "<\N{NO-BREAK SPACE}0.001")
        .fillna("–")
    )
