"""Give a report what a notebook found: its headline, and its tables and figures as files."""

from pathlib import Path

import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from kclib._util import files
from kclib.experiments._mime import HEADLINE


def headline(text: str, *, main: bool = False) -> None:
    """Show a notebook's answer in one sentence and record it for the index; its last cell calls this.

    Parameters
    ----------
    text : str
    main : bool
        Whether the report opens with it. If no notebook's is, the last one's does.
    """
    recorded = {"text": text, "main": main}
    display({HEADLINE: recorded, "text/markdown": f"**{text}**", "text/plain": text}, raw=True)


def keep(made: pd.DataFrame | Figure, path: str | Path) -> Path:
    """Write a table as CSV, or a figure as PNG, whole or not at all, and return its path.

    Parameters
    ----------
    made : pandas.DataFrame or matplotlib.figure.Figure
        Of a table the index is left out; a figure has 150 dots an inch.
    path : path

    Raises
    ------
    StorageError
        It could not be written; an older file of this name is then still whole.
    """
    with files.replacing(path) as temporary:
        if isinstance(made, Figure):
            made.savefig(temporary, format="png", dpi=150)
        else:
            made.to_csv(temporary, index=False)
    return Path(path)
