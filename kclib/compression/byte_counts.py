"""Count the bytes of a clustered network in each way that is used, and tell up to which K each way pays."""

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor, nn

from kclib import models
from kclib.clustering import Clustering, Group
from kclib.clustering._clustering import checked
from kclib.clustering._scopes import grouping
from kclib.compression import _architectures, _checkpoint, _entropy_coding, _precisions
from kclib.compression._container import Contents
from kclib.compression._counting import Count, orbit, pays_up_to
from kclib.compression._layers import N_TURNS, ClusteredConv2d, by_codebook
from kclib.compression._packing import index_bits, index_bytes
from kclib.compression._precisions import codebook_bytes, float_type, scale_type
from kclib.compression._replacement import output_order, packed_layers, users
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.kernels import extract
from kclib.kernels._bank import Kernels, bank_of, matched
from kclib.kernels._convolutions import parameters
from kclib.kmeans._entropy import counts, entropy_bytes
from kclib.models import Model

# Codebook precisions that are compared.
PRECISIONS = ("fp32", "fp16", "int8")
_ITEMS = (
    "indices", "frequency tables", "codebooks", "scales", "other convolution weights", "convolution biases",
    "linear weights", "rest",
)  # fmt: skip
# What the first word of a tensor's name in a file says it is, where it says enough.
_NAMED = dict(zip(("indices", "frequencies", "codebook", "scales"), _ITEMS, strict=False))
_NAMED["linear"] = "linear weights"
_TABLE_ROW = 4  # bytes that a cluster's frequency takes at most
_NOT_CONVOLUTIONS = ["linear weights", "rest"]

# What the dense model has in place of a clustering's numbers.
DENSE = dict.fromkeys(
    ("kernels_removed", "bytes_removed", "bytes_removed_fp16", "model_bytes_removed"), 0.0
) | {"clusters": 0, "inertia": 0.0, "cluster_seconds": 0.0}


def footprint(
    network: Model | nn.Module,
    clustering: Clustering,
    *,
    codings: Iterable[str] = ("fixed", "entropy"),
    linear: str | None = None,
) -> pd.DataFrame:
    """Return where the bytes go, dense and clustered, as `_checkpoint.save` writes them, and in memory.

    Parameters
    ----------
    codings : iterable of {"fixed", "entropy"}
        How indices, and linear weights of whole numbers, are coded. Entropy coding them takes a moment.
    linear : {"int8", "int4", "fp16", "bf16", "fp32"}, optional
        What linear weights are rounded to, as in `_replacement.compress`.

    Returns
    -------
    pandas.DataFrame
        Indexed by item, in bytes: a column ``dense``, and for each coding and precision of the codebook one
        like ``fixed_fp32`` or ``entropy_int8``. The items: ``kernels`` (the clustered kernels, dense),
        ``indices``, ``frequency tables`` (of entropy coding), ``codebooks``, ``scales``, ``other convolution
        weights`` (the sizes left out), ``convolution biases``, ``linear weights``, ``rest`` (all other
        parameters and buffers); then the sums ``convolutions`` and ``model``. Last, ``model in memory``: what
        the loaded network holds, with packed indices of fixed width, and codebooks, scales and linear weights
        in its own floating type, however few bytes these take in the file. Shared tensors count once.

    Examples
    --------
    >>> import kclib, torch
    >>> network = torch.nn.Conv2d(16, 16, 3)
    >>> table = kclib.footprint(network, kclib.cluster(network, 8))
    >>> table.loc[["kernels", "indices", "codebooks", "convolutions"], ["dense", "fixed_fp32", "fixed_fp16"]]
                  dense  fixed_fp32  fixed_fp16
    kernels        9216           0           0
    indices           0          96          96
    codebooks         0         288         144
    convolutions   9280         448         304
    """
    network = models.network_of(network)
    owners = matched(network, checked(clustering).layers)
    dense = sum(x.n_kernels * int(np.prod(x.shape[2:])) * x.itemsize for x in clustering.layers)
    values = [value for owner in owners.values() for value in parameters(owner)]
    other, biases, dense_linear, rest = _others(network, values)
    columns = {"dense": (dense, 0, 0, 0, 0, other, biases, dense_linear, rest)}
    if unknown := set(codings) - set(_checkpoint.CODINGS):
        raise UnknownNameError("coding of indices", min(unknown), _checkpoint.CODINGS)
    copies = _copies(network, clustering)
    shapes = [(g.n_clusters, g.codebook[0].size) for g in clustering.groups]
    scaled = {layer.name for group in clustering.groups if group.scales is not None for layer in group.layers}
    n_scales = sum(copies[x.name] * x.n_kernels for x in clustering.layers if x.name in scaled)
    fixed = _fixed(clustering, copies)
    for name in codings:
        indices, tables, linear_bytes = fixed, 0, dense_linear
        if linear is not None:
            linear_bytes = _precisions.linear_bytes(network, linear, entropy_coded=name == "entropy")
        if name == "entropy":
            indices, tables = _entropy_coded(network, clustering)
        for precision in PRECISIONS:
            books = sum(codebook_bytes(*shape, precision) for shape in shapes)
            scales = n_scales * scale_type(precision).itemsize
            parts = (0, indices, tables, books, scales, other, biases, linear_bytes, rest)
            columns[f"{name}_{precision}"] = parts
    table = pd.DataFrame(columns, index=["kernels", *_ITEMS], dtype="int64")
    model = table.sum()
    table.loc["convolutions"] = table.drop(index=_NOT_CONVOLUTIONS).sum()
    table.loc["model"] = model
    held = fixed + _floats(clustering, owners, copies) + other + biases + dense_linear + rest
    table.loc["model in memory"] = [model["dense"], *[held] * (len(columns) - 1)]
    return table


def ways(
    network: Model | nn.Module,
    clustering: Clustering,
    *,
    file: Contents | None = None,
    resident: Mapping[str, int] | None = None,
    linear: str | None = None,
) -> pd.DataFrame:
    """Return every way to count what a clustering saves, side by side.

    Parameters
    ----------
    network : torch.nn.Module
        Dense.
    clustering : Clustering
    file : Contents, optional
        Of a file that was written of it.
    resident : mapping of str to int, optional
        Bytes that a process was seen to hold, ``dense`` and ``packed`` (`residence.measure`).
    linear : str, optional
        What linear weights are rounded to, as in `footprint`.

    Returns
    -------
    pandas.DataFrame
        One row a way: ``way``; ``of``, what is counted; ``dense`` and ``kept``, kernels or bytes; ``removed``
        in percent; ``ratio``, dense / kept; ``pays_up_to``, the largest K a group at which less is kept than
        dense, and missing for what was measured. For entropy coding it is computed with indices of log2 K
        bits, the most that they can take beside tables and rounding.

        Son et al. 2018 count a 32-bit codebook and, for each kernel, log2 K bits and a 16-bit scale (as we
        read them), whether or not the clustering has scales.
    """
    table = footprint(network, clustering, linear=linear)
    groups = [group.layers for group in clustering.groups]
    most = max(len(group.indices) for group in clustering.groups)
    n_kernels, n_clusters = clustering.n_kernels, clustering.n_clusters
    rows = [("kernels removed (IPSJ report)", "kernels", n_kernels, n_clusters, most - 1)]
    for name, label in (("fixed", "fixed-width"), ("entropy", "entropy-coded")):
        for precision in PRECISIONS:
            limit = pays_up_to(groups, Count.of(clustering, precision, exact=name == "fixed"))
            for part in ("convolutions", "model"):
                sums = table.loc[part, ["dense", f"{name}_{precision}"]]
                rows.append((f"{label} indices, {precision} codebook", part, *sums, limit))
    kernels, convolutions, model = table.loc[["kernels", "convolutions", "model"], "dense"]
    without_indices = table.loc["convolutions", "fixed_fp16"] - table.loc["indices", "fixed_fp16"]
    bound = without_indices + entropy_bound(clustering)
    name = "entropy of the groups' indices, fp16 codebook"
    rows.append((name, "convolutions", convolutions, bound, None))
    formula = Count("fp32", exact=False, scale_bits=16)
    kept = sum(formula.bytes(group.layers, group.n_clusters) for group in clustering.groups)
    limit = pays_up_to(groups, formula)
    rows.append(("formula of Son et al. 2018", "clustered kernels", kernels, kept, limit))
    if file is not None:
        rows.append(("file, as it lies on disk", "model", model, file.bytes.sum(), None))
    if resident is not None:
        rows.append(("resident memory, measured", "model", resident["dense"], resident["packed"], None))
    result = pd.DataFrame(rows, columns=["way", "of", "dense", "kept", "pays_up_to"])
    result.insert(4, "removed", 100 * (1 - result.kept / result.dense))
    result.insert(5, "ratio", result.dense / result.kept)
    return result.astype({"pays_up_to": "Int64"})


@dataclass(frozen=True)
class Savings:
    """Shares removed, 0 to 1; negative where codebook and indices take more than the dense kernels.

    Attributes
    ----------
    kernels : float
        1 - K/N, over the clustered kernels: what the IPSJ report calls removed.
    bytes, bytes_fp16 : float
        Of all convolutions (weights of every size, and biases), with fixed-width indices and an fp32 and an
        fp16 codebook.
    model_bytes : float
        Of the whole model, with fixed-width indices and an fp32 codebook.
    """

    kernels: float
    bytes: float
    bytes_fp16: float
    model_bytes: float


def savings(network: Model | nn.Module, clustering: Clustering) -> Savings:
    """Return what a clustering removes, from its `footprint`."""
    table = footprint(network, clustering, codings=("fixed",)).loc[["convolutions", "model"]]
    removed = 1 - table.div(table["dense"], axis=0)
    return Savings(
        float(clustering.kernels_removed),
        float(removed.loc["convolutions", "fixed_fp32"]),
        float(removed.loc["convolutions", "fixed_fp16"]),
        float(removed.loc["model", "fixed_fp32"]),
    )


def removed(network: Model | nn.Module, result: Clustering) -> dict[str, float]:
    """Return a clustering's columns of the table that `kclib.sweep` returns."""
    saved = savings(network, result)
    return {
        "clusters": result.n_clusters,
        "kernels_removed": 100 * saved.kernels,
        "bytes": round(convolution_bytes(network) * (1 - saved.bytes)),
        "bytes_removed": 100 * saved.bytes,
        "bytes_removed_fp16": 100 * saved.bytes_fp16,
        "model_bytes_removed": 100 * saved.model_bytes,
        "inertia": result.inertia,
    }


def break_even(bank: Kernels, *, scope: str | Mapping[str, str] = "layer", precision: str = "fp32") -> int:
    """Return the largest K a group at which codebooks and fixed-width indices take fewer bytes than dense.

    Groups with fewer than K kernels have as many clusters as kernels. 0 if clustering never pays.

    Parameters
    ----------
    precision : {"fp32", "fp16", "bf16", "int8", "int4"}
        Of the codebook's values.
    """
    return pays_up_to(list(grouping(bank_of(bank), scope).values()), Count(precision))


def largest_k(network: Model | nn.Module, n_bytes: float, *, precision: str = "fp16") -> int:
    """Return the largest K, the same for each layer, that so many bytes of all convolutions hold.

    Indices are counted as entropy-coded where all representatives are used equally often, the most they take.

    Raises
    ------
    InvalidValueError
        Not even one cluster a layer fits.
    """
    bank = extract(network)
    kernels = sum(math.prod(layer.shape) * layer.itemsize for layer in bank.layers)
    free, count = n_bytes - convolution_bytes(network) + kernels, Count(precision, exact=False)

    def taken(k: int) -> float:
        ks = [min(k, layer.n_kernels) for layer in bank.layers]
        pairs = zip(bank.layers, ks, strict=True)
        return sum(count.bytes((layer,), x) + _TABLE_ROW * x for layer, x in pairs)

    found = bisect.bisect_right(range(1, 1 + max(x.n_kernels for x in bank.layers)), free, key=taken)
    if not found:
        raise InvalidValueError(
            f"n_bytes is {n_bytes:,.0f}; one cluster a layer takes {n_bytes - free + taken(1):,.0f}."
        )
    return found


def bits_by_kernel(bank: Kernels, clustering: Clustering) -> pd.DataFrame:
    """Return how strong each kernel is, and the bits that its index takes.

    Returns
    -------
    pandas.DataFrame
        A row a kernel, in the order of the bank: ``norm``, over the root mean square of its layer's (1 where
        all are 0); ``bits``, entropy-coded with its layer's frequencies.
    """
    bank = bank_of(bank)
    norms = np.linalg.norm(bank.points, axis=1).astype(float)
    for layer in bank.layers:
        norms[layer.rows] /= np.sqrt(np.square(norms[layer.rows]).mean()) or 1
    return pd.DataFrame({"norm": norms, "bits": _bits(clustering)})


def _bits(clustering: Clustering) -> np.ndarray:
    """Return the bits of each kernel's index, float64 ``(n,)``."""
    result = np.empty(clustering.n_kernels)
    for group in clustering.groups:
        ends = np.cumsum([layer.n_kernels for layer in group.layers])
        for layer, members in zip(group.layers, np.split(_members(group), ends[:-1]), strict=True):
            counts = np.bincount(members)
            result[layer.rows] = -np.log2(counts[members] / len(members))
    return result


def bits_by_layer(clustering: Clustering, *, precision: str = "fp16") -> pd.DataFrame:
    """Return how many bits a kernel takes, on average, in each layer.

    Returns
    -------
    pandas.DataFrame
        A row a layer: ``layer``; ``index``, entropy-coded; ``codebook``, its share of the group's codebook.
    """
    bits, rows = _bits(clustering), []
    for group in clustering.groups:
        book = _precisions.codebook_bytes(group.n_clusters, group.codebook[0].size, precision)
        share = 8 * book / sum(layer.n_kernels for layer in group.layers)
        rows += [(layer.name, bits[layer.rows].mean(), share) for layer in group.layers]
    return pd.DataFrame(rows, columns=["layer", "index", "codebook"])


def dense_bytes(network: Model | nn.Module) -> int:
    """Return the bytes of all parameters and buffers as they are; shared tensors count once."""
    network = models.network_of(network)
    return sum(x.nbytes for x in (*network.parameters(), *network.buffers()))


def convolution_bytes(network: Model | nn.Module) -> int:
    """Return the bytes of all convolutions' weights and biases, dense; shared tensors count once."""
    network = models.network_of(network)
    return sum(_others(network, ())[:2])  # weights and biases


def stored_bytes(network: Model | nn.Module) -> int:
    """Return the bytes of a network's convolutions, compressed or not, as `_checkpoint.save` writes them."""
    network = models.network_of(network)
    convolutions, chosen = _convolutions(network), _precisions.precisions(network)
    total = sum(value.nbytes for value in _checkpoint.encoded_layers(network)[1].values())
    for name, value in _architectures.others(network).items():
        if _item(name, convolutions) != "rest":
            precision = chosen.get(id(value))
            total += value.nbytes if precision is None else value.numel() * float_type(precision).itemsize
    return total


def entropy_bound(clustering: Clustering) -> float:
    """Return the bytes that the empirical entropy of the indices, each group's on its own, comes to."""
    return sum(
        entropy_bytes(counts(_members(group), group.n_clusters * orbit(group))) for group in clustering.groups
    )


def index_bits_by_layer(network: Model | nn.Module) -> pd.DataFrame:
    """Return the bits a kernel that each layer's indices take.

    Parameters
    ----------
    network : torch.nn.Module
        From `_replacement.compress`.

    Returns
    -------
    pandas.DataFrame
        ``layer``; ``fixed``, ceil(log2 K); ``coded``, entropy-coded, with the layer's table of frequencies or
        its share by kernels of the group's; ``entropy``, of the layer's indices alone; ``stored``, ``fixed``
        or ``coded``, what takes a file fewer bytes, for all layers of a codebook together.
    """
    network = models.network_of(network)
    rows = []
    for codebook, members in by_codebook(network):
        coded = _entropy_coding.coded([module.members() for module in members.values()], codebook.n_members)
        alike = [
            m.n_kernels for m, table in zip(members.values(), coded.tables, strict=True) if not table.size
        ]
        shared = coded.table.nbytes / max(1, sum(alike))
        stored = "fixed" if _checkpoint.coded(codebook, members) is None else "coded"
        for (name, module), words, table in zip(members.items(), coded.words, coded.tables, strict=True):
            n = module.n_kernels
            entropy = entropy_bytes(counts(module.members(), codebook.n_members))
            n_bytes = (words.nbytes + table.nbytes) / n + shared * (table.size == 0)
            rows.append((name, codebook.bits, 8 * n_bytes, 8 * entropy / n, stored))
    return pd.DataFrame(rows, columns=["layer", "fixed", "coded", "entropy", "stored"])


def clustered_bytes(
    network: Model | nn.Module, clustering: Clustering, *, coding: str = "entropy", precision: str = "fp16"
) -> int:
    """Return the bytes of a dense network's convolutions after clustering, as `footprint` counts them."""
    table = footprint(network, clustering, codings=[coding])
    return int(table.loc["convolutions", f"{coding}_{precision}"])


def _members(group: Group) -> np.ndarray:
    return group.indices if group.turns is None else group.indices * N_TURNS + group.turns


def _copies(network: nn.Module, clustering: Clustering) -> dict[str, int]:
    """Return how often a layer's indices are kept: tied plain and transposed layers order them apart."""
    return {
        x.name: len({output_order(user) for user in users(network, x.name).values()})
        for x in clustering.layers
    }


def _fixed(clustering: Clustering, copies: Mapping[str, int]) -> int:
    return sum(
        copies[layer.name] * index_bytes(layer.n_kernels, index_bits(group.n_clusters * orbit(group)))
        for group in clustering.groups
        for layer in group.layers
    )


def _floats(clustering: Clustering, owners: Mapping[str, nn.Module], copies: Mapping[str, int]) -> int:
    """Return the bytes of codebooks and scales in the floating types of the weights that they stand for."""
    total = 0
    for group in clustering.groups:
        n_scales = sum(copies[x.name] * x.n_kernels for x in group.layers) * (group.scales is not None)
        total += (group.codebook.size + n_scales) * parameters(owners[group.layers[0].name])[0].element_size()
    return total


def _entropy_coded(network: nn.Module, clustering: Clustering) -> tuple[int, int]:
    """Return the bytes of all indices and of all frequency tables, as a file codes them."""
    indices = tables = 0
    for codebook, members in by_codebook(nn.ModuleList(packed_layers(network, clustering).values())):
        coded = _checkpoint.coded(codebook, members)
        if coded is None:
            indices += sum(module.indices.numel() for module in members.values())
        else:
            indices, tables = indices + coded.index_bytes, tables + coded.table_bytes
    return indices, tables


def _others(network: nn.Module, clustered: Iterable[Tensor]) -> tuple[int, int, int, int]:
    """Return bytes of convolution weights not clustered, convolution biases, linear weights, and the rest."""
    linear = _precisions.linear_weights(network)
    convolutions = _convolutions(network)
    parts = dict.fromkeys(_ITEMS, 0)
    seen = {id(value) for value in clustered}
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if id(value) not in seen:
            seen.add(id(value))
            item = "linear weights" if id(value) in linear else _item(name, convolutions)
            parts[item] += value.numel() * value.element_size()
    return tuple(parts[item] for item in _ITEMS[-4:])


def _convolutions(network: nn.Module) -> set[str]:
    kinds = (nn.modules.conv._ConvNd, ClusteredConv2d)
    return {name for name, x in network.named_modules(remove_duplicate=False) if isinstance(x, kinds)}


def _item(name: str, convolutions: set[str]) -> str:
    """Return the item that a parameter or buffer counts to, by its name and those of all convolutions."""
    owner, leaf = _owner(name)
    if owner not in convolutions:
        return "rest"
    return "convolution biases" if leaf == "bias" else "other convolution weights"


def _owner(name: str) -> tuple[str, str]:
    """Split a parameter's name into its module's and its own, also where the module is parametrized."""
    owner, parametrized, rest = name.partition(".parametrizations.")
    if parametrized:
        return owner, rest.partition(".")[0]
    owner, _, leaf = name.rpartition(".")
    return owner, leaf
