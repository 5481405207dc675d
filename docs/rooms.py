"""Tell the API's pages which names of a room are the door's, and which page a name in a docstring means."""

import importlib
import itertools
import pkgutil
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

import kclib

MODULES = sorted(x.name for x in pkgutil.iter_modules(kclib.__path__) if not x.name.startswith("_"))
_LINKED = ("function", "class", "exception", "module")  # a parameter is no property of the same name
_MEMBERS = ("method", "property")


def names() -> dict[str, list[str]]:
    """Return the functions and classes that the door and each room hand out."""
    modules = [kclib, *(importlib.import_module(f"kclib.{name}") for name in MODULES)]
    return {
        x.__name__: [name for name in x.__all__ if callable(getattr(x, name))]
        for x in modules
        if hasattr(x, "__all__")
    }


def door() -> dict[str, str]:
    """Return the door's name of each thing that a room hands out as well: ``kclib.kernels.extract``."""
    found = {}
    for module, name in itertools.product(MODULES, kclib.__all__):
        if getattr(importlib.import_module(f"kclib.{module}"), name, None) is getattr(kclib, name):
            found[f"kclib.{module}.{name}"] = f"kclib.{name}"
    return found


def resolved(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, shown: nodes.Element
) -> nodes.Element | None:
    """Return a link to what a docstring calls by the last parts of its name, if that is one thing alone."""
    if node.get("refdomain") != "py":
        return None
    domain, target = env.domains.python_domain, node["reftarget"]
    if (last := target.rpartition(".")[2]) in kclib.__all__:
        target = f"kclib.{last}"
    kinds = _LINKED + _MEMBERS * ("." in target)
    matches = [x for x in domain.find_obj(env, None, None, target, None, 1) if x[1].objtype in kinds]
    if len(matches) != 1:
        return None
    name, entry = matches[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, shown, name)


def linked(app: Sphinx, doctree: nodes.document) -> None:
    """Make each full name on a page, such as ``kclib.shrink``, a link to its own page."""
    for node in list(doctree.findall(nodes.literal)):
        text = node.astext()
        if re.fullmatch(r"kclib(\.\w+)+", text) and not isinstance(node.parent, addnodes.pending_xref):
            options = {"refdomain": "py", "reftype": "obj", "reftarget": text, "refdoc": app.env.docname}
            node.replace_self(addnodes.pending_xref("", node.deepcopy(), refexplicit=True, **options))
