"""Voila's settings for `make dashboard`: of a notebook, only the cells tagged ``dashboard`` run."""

c = get_config()  # noqa: F821  (Voila runs this file with it)


def only_tagged(req, notebook, cwd):
    """Return the notebook without its other cells."""
    notebook.cells = [cell for cell in notebook.cells if "dashboard" in cell.metadata.get("tags", ())]
    return notebook


c.VoilaConfiguration.prelaunch_hook = only_tagged
