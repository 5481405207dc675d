"""A network while it is made small: clustered or not, rounded or not, with zeros that stay."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from kclib import compression, kernels
from kclib.clustering import Clustering, Group, by_use
from kclib.combination import _pruning
from kclib.compression import _formats, _layers, _precisions, byte_counts
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank, _copying
from kclib.models import Model

_FORMS = {"fp16": _formats.Half(), "int8": _formats.Rounded(8), "int4": _formats.Rounded(4)}


@dataclass(frozen=True)
class Stage:
    """What the steps of a pipeline so far made of a model.

    Attributes
    ----------
    model : Model
        Its network has ordinary dense weights: what stands for the kernels, to the bit.
    precision : str
        Of codebooks, or of the kernels where none are clustered; they are rounded to it.
    clustering : Clustering, optional
    kind : str
        What was pruned, of `_pruning.KINDS`; bytes of kernels that are not clustered count a mask of these.
    held : mapping of str to torch.Tensor, optional
        What pruning made zero: by convolution, bool in the shape of its weight.
    linear, biases : str, optional
        To what linear layers and biases will be rounded (`precisions.quantize`).
    """

    model: Model
    precision: str
    clustering: Clustering | None = None
    kind: str = "kernels"
    held: Mapping[str, Tensor] | None = None
    linear: str | None = None
    biases: str | None = None

    @classmethod
    def of(cls, model: Model) -> "Stage":
        """Return a dense model before any step."""
        first = kernels.extract(model.network).layers[0].name
        return cls(model, _precisions.own(model.network.get_submodule(first).weight.dtype))

    @property
    def bank(self) -> KernelBank:
        """The kernels as they stand."""
        return kernels.extract(self.model.network)

    def on(self, network: nn.Module, **changes) -> "Stage":
        """Return the stage with another network, and other changes."""
        return replace(self, model=replace(self.model, network=network), **changes)

    def pruned(self, network: nn.Module, kind: str) -> "Stage":
        """Return the stage with a network of which kernels, filters or weights are zero, and stay so."""
        stage = self.on(network, kind=kind, held=zeros(network))
        if self.clustering is None:
            return stage
        dead = ~stage.bank.weights.any(axis=(1, 2))
        return stage.clustered(tuple(_with_zero(group, dead[group.rows]) for group in self.clustering.groups))

    def clustered(self, groups: tuple[Group, ...]) -> "Stage":
        """Return the stage with these groups, equal representatives made one, unused ones none."""
        found = replace(self.clustering, groups=tuple(map(_distinct, groups)))
        return self.on(compression.inserted(self.model.network, found), clustering=found)

    def as_stored(self) -> "Stage":
        """Return the stage with its codebooks, or its kernels, rounded to its precision."""
        if self.clustering is None:
            return self.on(kernels.insert(self.model.network, _rounded(self.bank, self.precision)))
        groups = self.clustering.groups
        books = [_precisions.rounded(torch.from_numpy(x.codebook), self.precision).numpy() for x in groups]
        pairs = zip(groups, books, strict=True)
        return self.clustered(tuple(replace(group, codebook=book) for group, book in pairs))

    def packed(self) -> nn.Module:
        """Return a copy of the network, compressed where it is clustered."""
        if self.clustering is None:
            return _copying.copied(self.model.network)
        return compression.compress(self.model.network, self.clustering, precision=self.precision)

    def final(self) -> nn.Module:
        """Return the packed network with linear layers and biases rounded."""
        if self.linear is None and self.biases is None:
            return self.packed()
        return _precisions.quantize(self.packed(), linear=self.linear, biases=self.biases)

    def n_bytes(self, network: nn.Module) -> int:
        """Return the bytes of the convolutions of the final network, as stored."""
        if self.clustering is not None:
            return byte_counts.stored_bytes(network)
        saved = byte_counts.convolution_bytes(network) - byte_counts.stored_bytes(
            network
        )  # of rounded biases
        counted = "fp16" if self.precision == "bf16" else self.precision
        return _pruning.sparse_bytes(network, kind=self.kind, precision=counted) - saved

    def row(self, step: str, network: nn.Module) -> dict[str, object]:
        """Return what the step that made this stage did to bytes and kernels, of its final network."""
        alive = self.bank.weights.any(axis=(1, 2))
        return {"step": step, "bytes": self.n_bytes(network), "zero_kernels": 1 - float(alive.mean())}

    def guarded(self) -> nn.Module:
        """Return a packed copy whose pruned parts are zero again before each forward, for training."""
        network = self.packed()
        if self.held is None:
            return network
        for name, module in network.named_modules():
            if isinstance(module, _layers.Codebook):
                _guard(module, "values", self._held_values(module))
            elif isinstance(module, nn.modules.conv._ConvNd) and name in self.held:
                _guard(module, "weight", self.held[name])
        return network

    def trained(self, state: Mapping[str, Tensor]) -> "Stage":
        """Return the stage with the state that a packed copy got in training."""
        network = self.packed()
        network.load_state_dict(state)
        stage = self.on(compression.expanded(network))
        if self.clustering is not None:
            rows = stage.bank.weights
            groups = (replace(x, codebook=rows[x.rows][_first(x)]) for x in self.clustering.groups)
            stage = stage.clustered(tuple(groups))
        return stage.as_stored()

    def _held_values(self, codebook: _layers.Codebook) -> Tensor:
        """Return where all kernels of a representative were made zero, bool, in the order of a codebook."""
        group = next(x for x in self.clustering.groups if x.name == codebook.group)
        mask = np.ones(group.codebook.shape, bool)
        rows = [self.held[x.name].numpy().reshape(-1, *mask.shape[1:]) for x in group.layers]
        np.logical_and.at(mask, group.indices, np.concatenate(rows))
        mask |= ~group.codebook.any(axis=(1, 2), keepdims=True)
        return torch.from_numpy(by_use(replace(group, codebook=mask))[0])


def zeros(network: nn.Module) -> dict[str, Tensor]:
    """Return where the weights of convolutions are zero, by convolution, on the CPU."""
    return {
        name: (module.weight == 0).cpu()
        for name, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.conv._ConvNd)
    }


def thinned(found: Clustering, sparsity: float, weights: np.ndarray | None) -> tuple[Group, ...]:
    """Return the groups with a share of their codebooks' weights made zero, those of the least scores.

    The score is the square times the number of kernels served, or the sum of their weights ``(n,)``. Of equal
    ones the first stay; the best of each layer stays.

    Raises
    ------
    InvalidValueError
        The share leaves less than one to each layer.
    """
    scores = np.concatenate([_scores(group, weights).ravel() for group in found.groups])
    kept = np.argsort(-scores, kind="stable")[: scores.size - round(sparsity * scores.size)]
    if len(kept) < (least := np.count_nonzero(np.isinf(scores))):
        raise InvalidValueError(
            f"{scores.size - len(kept)} of {scores.size} weights of codebooks are to go; "
            f"at most {scores.size - least} can, as each layer keeps one."
        )
    mask = np.zeros(scores.shape, bool)
    mask[kept] = True
    masks = np.split(mask, np.cumsum([group.codebook.size for group in found.groups])[:-1])
    return tuple(
        replace(group, codebook=np.where(part.reshape(group.codebook.shape), group.codebook, np.float32(0)))
        for group, part in zip(found.groups, masks, strict=True)
    )


def _scores(group: Group, weights: np.ndarray | None) -> np.ndarray:
    """Return the scores of a codebook's weights, infinite for the best of each layer."""
    served = None if weights is None else weights[group.rows]
    served = np.bincount(group.indices, served, minlength=group.n_clusters)
    scores = np.square(group.codebook, dtype=np.float64).reshape(len(served), -1) * served[:, None]
    best, start = [], 0
    for layer in group.layers:
        used = np.unique(group.indices[start : (start := start + layer.n_kernels)])
        row, column = np.unravel_index(scores[used].argmax(), (len(used), scores.shape[1]))
        best.append((used[row], column))
    scores[tuple(np.transpose(best))] = np.inf
    return scores


def _with_zero(group: Group, dead: np.ndarray) -> Group:
    """Return a group with a representative more, zero, for the kernels that are dead, bool ``(n,)``."""
    zero = np.zeros_like(group.codebook, shape=(1, *group.codebook.shape[1:]))
    indices = np.where(dead, np.int32(group.n_clusters), group.indices)
    return replace(group, codebook=np.concatenate([group.codebook, zero]), indices=indices)


def _distinct(group: Group) -> Group:
    """Return a group without unused representatives, and with one of those that are equal, the first."""
    used, indices = np.unique(group.indices, return_inverse=True)
    _, first, same = np.unique(
        group.codebook[used].reshape(len(used), -1), axis=0, return_index=True, return_inverse=True
    )
    kept = np.sort(first)
    indices = np.searchsorted(kept, first[same.reshape(-1)])[indices.reshape(-1)].astype(np.int32)
    return replace(group, codebook=group.codebook[used[kept]], indices=indices)


def _first(group: Group) -> np.ndarray:
    """Return the first kernel of each representative, int ``(K,)``."""
    return np.unique(group.indices, return_index=True)[1]


def _rounded(bank: KernelBank, precision: str) -> KernelBank:
    """Return kernels that are not clustered as a precision stores them."""
    if precision in _FORMS:
        return _formats.decoded(bank, _FORMS[precision])
    return replace(bank, weights=_precisions.rounded(torch.tensor(bank.weights), precision).numpy())


def _guard(module: nn.Module, part: str, mask: Tensor) -> None:
    module.held = part, mask
    module.register_forward_pre_hook(_zero_again)


@torch.no_grad()
def _zero_again(module: nn.Module, _: tuple) -> None:
    """Make zero what a module holds so; a function of the module alone, so that a copy has its own."""
    part, mask = module.held
    value = getattr(module, part)
    mask = mask.to(value.device)
    if value[mask].any():  # what autograd keeps of a shared weight must not change without need
        value.masked_fill_(mask, 0)
