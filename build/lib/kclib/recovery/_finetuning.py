"""Win back accuracy that clustering took: train a compressed network, its bytes staying as they are."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kclib import datasets, evaluation, models, training
from kclib._util import checks
from kclib.compression import _attributes, _layers, _packing, _precisions
from kclib.compression._layers import ClusteredConv2d
from kclib.kmeans import _nearest
from kclib.training import Recipe, Trained

RECIPE = Recipe(epochs=6, images=12_800, peak_rate=1e-4, weight_decay=0, label_smoothing=0, patience=3)


def finetune(
    model: models.Model | nn.Module,
    data: datasets.ImageSet,
    checkpoint: Path,
    *,
    teacher: models.Model | nn.Module | None = None,
    recipe: Recipe = RECIPE,
    reassigned: int = 0,
    device: str = "cpu",
) -> Trained:
    """Train a copy of a compressed network: its codebooks, scales, biases, batch norms and dense layers.

    The gradient of a representative is the sum over the kernels it stands for (Han, Mao and Dally 2016, *Deep
    Compression*, section 3.2). Indices stay as they are; then, for `reassigned` further epochs, they move
    too: beside each index a latent kernel is trained, which starts at its representative and takes the
    gradient that a kernel of its own would get (straight through: Bengio, Léonard and Courville 2013,
    *Estimating or Propagating Gradients Through Stochastic Neurons*), and before each check the index becomes
    that of the representative nearest to it. K and the bits of a fixed-width index stay. Layers whose kernels
    are scaled or turned keep their indices.

    What is checked on held-back images and returned has its codebooks and scales rounded to their precision,
    so that `compression.save` and `compression.load` give it back to the bit; what trains on is not rounded.
    A dense network is trained by the same rules for just as long, as a control.

    Parameters
    ----------
    model : Model or torch.nn.Module
        Its network, in float32, comes from `compression.compress` or is dense; unchanged.
    data : ImageSet
        Training images, uint8 in memory.
    checkpoint : path
        Where the state goes after each epoch; the same call resumes. Further epochs with re-assignment have
        their own file beside it, ``NAME.reassigned.SUFFIX``.
    teacher : Model or torch.nn.Module, optional
        The dense network, for example: its answers take the place of the labels (`training.train`).
    recipe : Recipe
        Of both parts, each with its own rise and fall of the rate, and its own patience.
    reassigned : int
        Epochs with re-assignment.
    device : str

    Returns
    -------
    Trained
        The epochs with re-assignment follow the others in its history; where patience ended those early,
        theirs are numbered on from there.

    Raises
    ------
    InvalidValueError, DamagedFileError
        As `training.train`; values that the precision of a codebook cannot hold.

    Examples
    --------
    >>> import kclib, pathlib, tempfile, torch
    >>> from kclib.training import Recipe
    >>> pictures = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    >>> images = kclib.ImageSet("noise", pictures, torch.arange(12) % 2, ("shirt", "coat"), fingerprint="1")
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 2))
    >>> small = kclib.compress(network, kclib.cluster(network, 4))
    >>> recipe = Recipe(epochs=1, batch_size=4, held_back=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trained = kclib.finetune(small, images, pathlib.Path(folder, "state.pt"), recipe=recipe)
    epoch 0, held_back ...
    epoch 1, loss ..., held_back ...
    """
    given, model = model, models.as_model(model)
    teacher = None if teacher is None else models.network_of(teacher)
    reassigned = checks.check_whole("reassigned", reassigned, 0)
    if teacher is None:
        data = evaluation.matched(model, data)
    options, checkpoint = {"teacher": teacher, "device": device}, Path(checkpoint)
    first = training.train(
        model.network, data, model.preprocess, recipe, checkpoint, after_epoch=_rounded, **options
    )
    if not reassigned:
        return replace(first, model=models.like(given, first.network))
    second = training.train(
        _with_latents(first.network), data, model.preprocess, replace(recipe, epochs=reassigned),
        checkpoint.with_stem(f"{checkpoint.stem}.reassigned"), after_epoch=_reassigned, **options,
    )  # fmt: skip
    done = len(first.history) - 1
    further = ({**row, "epoch": done + row["epoch"]} for row in second.history[1:])
    return Trained(models.like(given, _without_latents(second.network)), (*first.history, *further))


class _Reassignable(ClusteredConv2d):
    """A clustered convolution with a `latent` kernel an index, ``(n, kh * kw)``, that hears its gradient."""

    def _decoded(self, first: int, last: int) -> Tensor:
        weight = super()._decoded(first, last)
        latent = self.latent[first * self._fan_in : last * self._fan_in]
        if self.transposed:
            latent = latent.reshape(len(weight) // self._fan_in, -1, self._fan_in, latent.shape[1])
            latent = latent.transpose(1, 2)
        return weight + (latent - latent.detach()).reshape(weight.shape)

    @torch.no_grad()
    def reassign(self) -> None:
        """Make each index that of the representative nearest to its latent kernel."""
        latent, table = (x.detach().cpu().numpy() for x in (self.latent, self.codebook.table()))
        found = _nearest.nearest(latent, table, guess=self.members())
        self.indices.copy_(torch.from_numpy(_packing.pack(found.labels, self.codebook.bits)))


def _with_latents(network: nn.Module) -> nn.Module:
    """Return a copy in which the indices of plain kernels can move; shared ones by shared latents."""

    def moves(module: ClusteredConv2d) -> bool:
        return module.scales is None and not module.codebook.turned

    network, latents = _made_of(network, lambda x: _Reassignable if moves(x) else ClusteredConv2d), {}
    for module in _layers.clustered(network).values():
        if isinstance(module, _Reassignable):
            values = module.codebook.values
            members = torch.from_numpy(module.members()).long().to(values.device)
            latent = nn.Parameter(values.detach().flatten(1)[members], values.requires_grad)
            module.latent = latents.setdefault(id(module.indices), latent)
    return network


def _without_latents(network: nn.Module) -> nn.Module:
    """Return a copy in which all clustered convolutions are ordinary ones again."""
    movable = [name for name, x in _layers.clustered(network).items() if isinstance(x, _Reassignable)]
    network = _made_of(network, lambda _: ClusteredConv2d)
    for name in movable:
        del network.get_submodule(name).latent
    return network


def _made_of(network: nn.Module, kind: Callable[[ClusteredConv2d], type[ClusteredConv2d]]) -> nn.Module:
    """Return a copy with clustered convolutions of these kinds, which share what the former ones did."""
    made, copies = {}, {}
    for module in _layers.clustered(network).values():
        parts = (module.codebook, module.indices, module.scales, module.bias)
        codebook, indices, scales, bias = (copy.deepcopy(x, copies) for x in parts)
        options = {"scales": scales, "bias": bias, "block_bytes": module.block_bytes}
        made[id(module)] = kind(module)(module, codebook, indices, **options)
    return _attributes.swapped(network, made)


def _reassigned(network: nn.Module) -> nn.Module:
    """Re-assign the indices of `network` in place, and return a rounded copy."""
    for module in _layers.clustered(network).values():
        if isinstance(module, _Reassignable):
            module.reassign()
    return _rounded(network)


@torch.no_grad()
def _rounded(network: nn.Module) -> nn.Module:
    """Return a copy whose codebooks and scales are what a file would hold."""
    network = copy.deepcopy(network)
    for codebook, members in _layers.by_codebook(network):
        codebook.values.copy_(_precisions.rounded(codebook.values, codebook.precision))
        for scales in (module.scales for module in members.values() if module.scales is not None):
            stored = scales.to("cpu", _precisions.scale_type(codebook.precision))
            scales.copy_(_precisions.checked(stored, codebook.precision))
    return network
