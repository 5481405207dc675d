"""The compressed model: every kernel replaced by its representative."""

from torch import nn

from kclib import kernels
from kclib.clustering import Clustering, quantized


def compress(network: nn.Module, clustering: Clustering) -> nn.Module:
    """Return a copy of `network` in which each kernel is its cluster's representative.

    Raises
    ------
    InvalidValueError
        If the clustering comes from another architecture.
    """
    return kernels.insert(network, kernels.KernelBank(quantized(clustering), clustering.layers, {}))
