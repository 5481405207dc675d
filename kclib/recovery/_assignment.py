"""Kernels get their representatives channel by channel, each making good the error of those before it."""

from dataclasses import dataclass

import torch
from torch import Tensor

_SOONER = 10  # times the damping, where a matrix has no Cholesky factor with less
_BLOCK = 32  # input channels whose error is carried to the later ones at once
_COMPARED = 1 << 25  # distances held at once


@dataclass(frozen=True)
class CountedCodebook:
    """A codebook, and how often it is used.

    Attributes
    ----------
    values : torch.Tensor
        float32 ``(K, area)``.
    counts : torch.Tensor
        int64 ``(K,)``, above 0.
    """

    values: Tensor
    counts: Tensor

    @classmethod
    def of(cls, values: Tensor, indices: Tensor) -> "CountedCodebook":
        """Return the rows of a codebook that indices ``(n,)`` use."""
        counts = torch.bincount(indices, minlength=len(values))
        return cls(values[counts > 0], counts[counts > 0])

    def to(self, device) -> "CountedCodebook":
        return CountedCodebook(self.values.to(device), self.counts.to(device))

    def price(self, unit: float) -> Tensor | None:
        """Return what each index costs, ``(K,)``, at so much a bit: bits as an entropy coder spends them."""
        return -unit * (self.counts / self.counts.sum()).log2() if unit else None


@dataclass(frozen=True)
class Metric:
    """How errors in the weights of a convolution's group count, and in which order its channels are assigned.

    Attributes
    ----------
    columns : torch.Tensor
        int64 ``(d,)``: the weights' places, channel by channel, the channels of most energy first.
    factor : torch.Tensor
        float32 ``(d, d)``, upper: times its transpose it is the damped moments, places in that order.
    area : int
        Places of a channel.
    """

    columns: Tensor
    factor: Tensor
    area: int

    @classmethod
    def of(cls, h: Tensor, area: int, damping: float) -> "Metric":
        """Return the metric of moments ``(d, d)``.

        The upper factor of a matrix is the lower one of its reverse, reversed.
        """
        energy = h.diagonal().reshape(-1, area).mean(1)
        order = energy.argsort(descending=True, stable=True)
        columns = (order[:, None] * area + torch.arange(area, device=h.device)).reshape(-1)
        back = columns.flip(0)
        return cls(columns, factor(h[back][:, back], damping).flip(0, 1), area)

    def solved(self, right: Tensor) -> Tensor:
        """Return what times the damped moments is ``right``, both ``(n, d)``."""
        upper = self.factor
        half = torch.linalg.solve_triangular(upper.mT, right[:, self.columns], upper=False, left=False)
        result = torch.empty_like(right)
        result[:, self.columns] = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
        return result

    def assigned(self, target: Tensor, codebook: Tensor, price: Tensor | None = None) -> Tensor:
        """Return an index for each kernel of ``(out, d)``, int64 ``(out, d / area)``.

        The error counts as ``‖(target − weights) @ factor‖²``, of which each channel's columns have a part
        that hangs on this channel and on those before it alone. Each kernel gets the representative for which
        that part, plus the price, is least. It is GPTQ's rule (Frantar et al. 2023, equation 2) as the search
        of a nearest plane (Chen et al. 2025, *The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane
        Algorithm*), with a kernel as the vector.

        Parameters
        ----------
        codebook : torch.Tensor
            ``(K, area)``.
        price : torch.Tensor, optional
            ``(K,)``: what each representative costs, beside its error.
        """
        area, factor = self.area, self.factor
        target = target[:, self.columns]
        indices = torch.empty(len(target), len(factor) // area, dtype=torch.int64, device=target.device)
        heard = torch.zeros_like(target)  # what the errors of earlier channels add to the later ones' part
        for first in range(0, len(factor), _BLOCK * area):
            block = slice(first, min(first + _BLOCK * area, len(factor)))
            errors = torch.empty_like(target[:, block])
            for start in range(block.start, block.stop, area):
                place, later = slice(start, start + area), slice(start + area, block.stop)
                own = factor[place, place]
                wanted = torch.addmm(heard[:, place], target[:, place], own)
                chosen = nearest(wanted, codebook @ own, price)
                error = target[:, place] - codebook[chosen]
                heard[:, later] += error @ factor[place, later]
                errors[:, start - first : start - first + area] = error
                indices[:, self.columns[start] // area] = chosen
            heard[:, block.stop :] += errors @ factor[block, block.stop :]
        return indices


def factor(h: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of moments ``(d, d)`` and a share of their mean energy.

    Damping below what rounding left of the moments is raised until there is a factor.
    """
    energy = h.diagonal().double().mean()
    ridge = damping * energy if energy > 0 else torch.ones_like(energy)  # where nothing is read, any will do
    while True:
        damped = h.clone()
        damped.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower
        ridge = _SOONER * ridge


def nearest(points: Tensor, centres: Tensor, price: Tensor | None = None) -> Tensor:
    """Return the nearest of ``(K, d)`` centres to each of ``(n, d)`` points, int64 ``(n,)``, in blocks.

    Both are moved and scaled first: products of values far from 0, huge or tiny, have no digits left for it.
    """
    shift = centres.mean(0)
    centres = centres - shift
    unit = centres.abs().max()
    unit = torch.where(unit > 0, unit, 1)
    centres = centres / unit
    half = centres.square().sum(1) / 2
    if price is not None:
        half = half + price / (2 * unit.square())
    rows = max(1, _COMPARED // len(centres))
    return torch.cat(
        [
            torch.addmm(half, (part - shift) / unit, centres.mT, alpha=-1).argmin(1)
            for part in points.split(rows)
        ]
    )
