"""Settings of the site: ``make docs`` builds it into ``docs/_build/html``."""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the library as it is in this checkout
sys.path.insert(0, str(HERE))

import notebook_pages
import rooms

import kclib

project, author, release = "kclib", "the kclib authors", kclib.__version__
copyright = "the kclib authors, MIT licence"
extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
templates_path = ["_templates"]

html_theme = "pydata_sphinx_theme"
html_title = "kclib: kernel clustering"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "logo": {"text": "kclib"},
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "navbar_end": ["theme-switcher"],
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
}
html_sidebars = {x: [] for x in ("index", "start", "own-network", "contributing", "changes")}
html_context = {"default_mode": "auto"}
html_show_sourcelink = False
html_copy_source = False

# Pages: GitHub's anchors, so that the same links work there.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# Notebooks are shown as they were run, never run here, and without anything from another server.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_output_stderr = "remove"
nb_merge_streams = True

# The API: a page for a room lists what it hands out, and each name has a page.
autosummary_generate = True
autosummary_context = {"rooms": {"names": rooms.names(), "door": rooms.door()}}
autodoc_typehints = "none"  # numpydoc's sections say them
numpydoc_show_class_members = False
default_role = "py:obj"
toc_object_entries = False
copybutton_exclude = ".linenos, .gp, .go"
linkcheck_timeout = 20
linkcheck_anchors = False

notebook_pages.write(HERE.parent, HERE / "notebooks")
command_line = [
    sys.executable,
    "-m",
    "typer",
    "kclib.cli",
    "utils",
    "docs",
    "--name",
    "kclib",
    "--title",
    "Command line",
]
subprocess.run(
    [*command_line, "--output", HERE / "command-line.md"], cwd=HERE.parent, check=True, capture_output=True
)


def shown_as_run(app, name, source):
    """Let links to notebooks, which lead to their files on GitHub, lead to their pages here."""
    source[0] = source[0].replace("](../notebooks/", "](notebooks/")


def with_sample(app, error):
    """Put the sample of a report beside the pages, where there is one."""
    if error is None and (HERE / "sample").is_dir():
        shutil.copytree(HERE / "sample", Path(app.outdir) / "sample", dirs_exist_ok=True)


if (HERE / "sample").is_dir():
    tags.add("sample")  # noqa: F821 (Sphinx gives it): pages then link to it


def setup(app):
    """Let links and names lead to pages of the site, and the sample be among them."""
    app.connect("source-read", shown_as_run)
    app.connect("doctree-read", rooms.linked)
    app.connect("missing-reference", rooms.resolved)
    app.connect("build-finished", with_sample)
