"""How alike are the 2D kernels of a CNN, how few would do, and what does that cost?

>>> import kclib
>>> model, images = kclib.load_model("vgg16-fashion"), kclib.load_data("fashion-mnist", limit=50)
>>> clusters = kclib.cluster(kclib.extract(model), 16)
>>> print(f"{clusters.kernels_removed:.2%} of the kernels removed")
99.99% of the kernels removed
>>> small = kclib.compress(model, clusters)
>>> lost = kclib.drop(kclib.evaluate(model, images), kclib.evaluate(small, images))
>>> lost.points.low > 50  # accuracy points: 16 representatives a layer are too few
True

Whatever takes a network takes a `Model` or any `torch.nn.Module`, and a `Model` in is a `Model` out.
Nothing that is given is changed. Names are loaded when they are first used. Wrong input raises a type of
`kclib.errors`, with one sentence that says what would be right; a docstring has a section for it where there
is more to say.
"""

__version__ = "0.1.0"

from kclib._util import lazy_names, places

places.prepare()
__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__,
    submodules=["kmeans", "plots", "similarity"],
    submod_attrs={
        "clustering": ["Clustering", "cluster"],
        "compression": ["compress", "expand", "export", "footprint", "load", "save"],
        "datasets": ["ImageSet", "load_data"],
        "evaluation": ["Evaluation", "drop", "evaluate"],
        "experiments": ["sweep"],
        "explorers": ["explore"],
        "kernels": ["KernelBank", "extract", "insert"],
        "loading": ["load_model"],
        "models": ["Model"],
        "recovery": ["finetune", "shrink"],
    },
)
