"""What moved between two sweeps: each cell's accuracy before and after, with intervals."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import confint_proportions_2indep, test_proportions_2indep

from kclib._util import checks, files
from kclib.errors import DamagedFileError, InvalidValueError, MissingFileError, reason
from kclib.evaluation import _accuracy
from kclib.experiments import _columns, _reports

CELL = ("model", "data", "scope", "k", "method", "seed")
_NEEDED = (*CELL, "images", "images_hash", "right", "top1", "bytes")


def read(path: str | Path) -> pd.DataFrame:
    """Return the results of a sweep, from ``results.parquet`` or the folder of its report.

    Raises
    ------
    MissingFileError, DamagedFileError, InvalidValueError
        The file does not exist; it is damaged; it is not a table of results.
    """
    path = files.expanded(path)
    path = path / "results.parquet" if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise MissingFileError(f"{path} does not exist; kclib sweep writes results.parquet into its report.")
    try:
        table = pd.read_parquet(io.BytesIO(path.read_bytes()))
    except Exception as error:  # a damaged file can make its reader raise almost anything
        raise DamagedFileError(f"{path} is no whole parquet file ({reason(error)}).") from error
    checks.check_columns(table, _NEEDED)
    return table


def compare(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Return what moved between two runs, a row a cell of either.

    Where both runs saw the same images, the interval is the paired one and the p-value McNemar's
    (`evaluation.drop`); else the interval is Newcombe's (1998) for two independent proportions, and the
    p-value the score test's.

    Parameters
    ----------
    before, after : pandas.DataFrame
        As `_cell.Subject.table`, of any models and data sets.

    Returns
    -------
    pandas.DataFrame
        ``model``, ``data``, ``scope``, ``k``, ``method``, ``seed``; ``top1_before``, ``top1_after`` in
        percent; ``change`` in points, negative if the second is worse, with ``change_low`` and
        ``change_high``; ``p_value``; ``images``, of the second run; ``bytes_before``, ``bytes_after``;
        ``paired`` (whether the images are the same). What only one run has is NaN in the other's columns.

    Raises
    ------
    InvalidValueError
        A column is missing, or a cell is in a table twice.
    """
    for table in (before, after):
        checks.check_columns(table, _NEEDED)
        if (again := table[list(CELL)].duplicated()).any():
            cell = _called(table.loc[again].iloc[0])
            raise InvalidValueError(f"the table has the cell {cell} twice; it must have each once.")
    old, new = (table.set_index(list(CELL)) for table in (before, after))
    cells = [*old.index, *(cell for cell in new.index if cell not in old.index)]
    rows = []
    for cell in cells:
        a, b = (table.loc[cell] if cell in table.index else None for table in (old, new))
        rows.append(dict(zip(CELL, cell, strict=True)) | _row(a, b))
    return pd.DataFrame(rows)


def broken(table: pd.DataFrame, max_drop: float) -> list[str]:
    """Return a sentence for each cell that lost more than so many points, or is gone.

    A drop counts as it was measured, not by an end of its interval.

    Parameters
    ----------
    table : pandas.DataFrame
        From `compare`.
    max_drop : float
        Points of top-1 accuracy, at least 0.
    """
    checks.check_real("max_drop", max_drop, lambda x: x >= 0, "a number of points, at least 0")
    sentences = []
    for row in table.itertuples():
        what = _called(row)
        if pd.isna(row.top1_after):
            sentences.append(f"{what}: is missing in the second run.")
        elif row.change < -max_drop - 1e-9:  # 0.7 points of images are 0.70000000000000007
            sentences.append(f"{what}: from {row.top1_before:.2f} to {row.top1_after:.2f} %, {_said(row)}.")
    return sentences


def answer(table: pd.DataFrame) -> str:
    """Return in one sentence what `compare` found."""
    both = table.dropna(subset=["change"])
    moved = both[(both.change_low > 0) | (both.change_high < 0)]
    gone, new = table.top1_after.isna().sum(), table.top1_before.isna().sum()
    text = f"{len(both):,} cells are in both runs; {len(moved):,} of them moved beyond chance"
    if len(both):
        worst = both.loc[both.change.idxmin()]
        text += f". The worst of them (scope {worst.scope}, K = {worst.k:,}) shows {_said(worst)}"
    return f"{text}. Cells gone: {gone:,}; new: {new:,}."


def write(path: Path, table: pd.DataFrame, sentences: Sequence[str], *, before: str, after: str) -> None:
    """Write what `compare` found as a page; `sentences` from `broken` come first."""
    text = _readable(table).to_html(index=False, border=0)
    values = {"broken": sentences, "answer": answer(table), "before": before, "after": after}
    _reports.write_page(files.expanded(path), "changes", table=text, **values)


def _said(row) -> str:
    """Return a change as a sentence's object."""
    return _accuracy.in_words(-row.change, -row.change_high, -row.change_low, int(row.images))


def _called(row) -> str:
    return f"{row.model} on {row.data}, scope {row.scope}, K = {row.k:,}, {row.method}, seed {row.seed}"


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return what `compare` found as text for readers."""
    spans = zip(table.change, table.change_low, table.change_high, strict=True)
    columns = {
        "clustering": _columns.clusterings(table),
        "change (points)": [
            "–" if pd.isna(x) else f"{x:+.2f} [{low:+.2f}, {high:+.2f}]" for x, low, high in spans
        ],
        **_columns.varied(table),
        "p": _columns.p_values(table.p_value),
        "images": table.paired.map({True: "the same", False: "others"}).where(table.change.notna(), "–"),
    }
    for when in ("before", "after"):
        for name, unit, form in (("top1", "top-1 (%)", "{:.2f}"), ("bytes", "bytes", "{:,.0f}")):
            numbers = table[f"{name}_{when}"].map(form.format, na_action="ignore")
            columns[f"{unit} {when}"] = numbers.fillna("–")
    return pd.DataFrame(columns)


def _row(before: pd.Series | None, after: pd.Series | None) -> dict:
    """Return the numbers of a cell that one run, or both, have."""
    row = {}
    for name, cell in (("before", before), ("after", after)):
        row[f"top1_{name}"] = np.nan if cell is None else float(cell.top1)
        row[f"bytes_{name}"] = np.nan if cell is None else float(cell.bytes)
    row["images"] = np.nan if after is None else after.images
    names = ("change", "change_low", "change_high", "p_value", "paired")
    if before is None or after is None:
        return row | dict(zip(names, (*[np.nan] * 4, False), strict=True))
    paired = before.images_hash == after.images_hash and before.images == after.images
    return row | dict(zip(names, (*(_paired if paired else _unpaired)(before, after), paired), strict=True))


def _paired(before: pd.Series, after: pd.Series) -> Sequence[float]:
    lost = _accuracy.paired(_right(before), _right(after))
    points = lost.points
    return 0.0 - points.estimate, 0.0 - points.high, 0.0 - points.low, lost.p_value


def _unpaired(before: pd.Series, after: pd.Series) -> Sequence[float]:
    (a, n), (b, m) = ((int(_right(x).sum()), int(x.images)) for x in (before, after))
    low, high = confint_proportions_2indep(b, m, a, n, method="newcomb")
    p_value = test_proportions_2indep(b, m, a, n, method="score").pvalue if 0 < a + b < n + m else 1.0
    return 100 * (b / m - a / n), 100 * low, 100 * high, float(p_value)


def _right(row: pd.Series) -> np.ndarray:
    """Return which images a cell answers rightly: bool ``(images,)``."""
    return np.unpackbits(np.frombuffer(row.right, np.uint8), count=int(row.images)).astype(bool)
