"""Second moments of samples, and the ridge regression that they determine. Nothing else of a sample is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mdp_mmdet3d.surgery.repair.processes import is_distributed


class Moments:
    """Of the inputs X of a linear map with independent groups, of what its outputs lack, R, and of the targets T.

    Sums are centred and kept in float64, so that neither the number of samples nor their mean costs digits.

    Attributes:
        samples: How many there are.
        count: The sum of their weights, which are 1 unless said otherwise.

    Args:
        groups: Groups G.
        inputs: Inputs D of a group.
        outputs: Outputs K of a group.
        device: Where the sums are kept.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.samples, self.count = 0, 0.0
        self.mean_x, self.mean_r, self.mean_t = zeros(inputs), zeros(outputs), zeros(outputs)
        self.xx, self.xr, self.rr, self.tt = (
            zeros(inputs, inputs),
            zeros(inputs, outputs),
            zeros(outputs),
            zeros(outputs),
        )

    def add(self, x: Tensor, r: Tensor, t: Tensor, weights: Tensor | None = None) -> None:
        """Add samples: X (G, P, D), R and T (G, P, K); ``weights`` (P,) say how much each counts."""
        if x.shape[1] == 0:
            return
        self.samples += x.shape[1]
        if weights is None:
            count = float(x.shape[1])
            means = [value.double().mean(dim=1) for value in (x, r, t)]
            x, r, t = (value - mean.to(value.dtype)[:, None] for value, mean in zip((x, r, t), means))
        else:
            count = float(weights.double().sum())
            share, root = (weights.double() / count)[:, None], weights.sqrt()[:, None]
            means = [(value.double() * share).sum(dim=1) for value in (x, r, t)]
            x, r, t = ((value - mean.to(value.dtype)[:, None]) * root for value, mean in zip((x, r, t), means))
        sums = (x.mT @ x).double(), (x.mT @ r).double(), *(v.double().square().sum(dim=1) for v in (r, t))
        self._merge(count, means, sums)

    def merge(self, other: Moments) -> None:
        """Add the samples of another."""
        self.samples += other.samples
        if other.count:
            means = (other.mean_x, other.mean_r, other.mean_t)
            self._merge(other.count, means, (other.xx, other.xr, other.rr, other.tt))

    def _merge(self, count: float, means: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        own = (self.mean_x, self.mean_r, self.mean_t)
        dx, dr, dt = (mean - mine for mean, mine in zip(means, own))
        between = self.count * count / (self.count + count)
        self.xx += sums[0] + between * dx[:, :, None] * dx[:, None, :]
        self.xr += sums[1] + between * dx[:, :, None] * dr[:, None, :]
        self.rr += sums[2] + between * dr.square()
        self.tt += sums[3] + between * dt.square()
        self.count += count
        for mine, difference in zip(own, (dx, dr, dt)):
            mine += difference * (count / self.count)

    def reduce(self) -> None:
        """Make them the moments of the samples of all processes."""
        if not is_distributed():
            return
        total = torch.tensor([self.count, self.samples], dtype=torch.float64, device=self.xx.device)
        dist.all_reduce(total)
        count, self.samples = float(total[0]), round(float(total[1]))
        means = []
        for own in (self.mean_x, self.mean_r, self.mean_t):
            mean = own * (self.count / max(count, 1e-12))
            dist.all_reduce(mean)
            means.append(mean)
        dx, dr, dt = (own - mean for own, mean in zip((self.mean_x, self.mean_r, self.mean_t), means))
        self.xx += self.count * dx[:, :, None] * dx[:, None, :]
        self.xr += self.count * dx[:, :, None] * dr[:, None, :]
        self.rr += self.count * dr.square()
        self.tt += self.count * dt.square()
        for sums in (self.xx, self.xr, self.rr, self.tt):
            dist.all_reduce(sums)
        self.mean_x, self.mean_r, self.mean_t = means
        self.count = count

    def solve(self, ridge: float, centred: bool) -> Tensor:
        """What to add to the weights (G, K, D), held to those that the map has; in float64.

            G = X^T X + ridge * mean(diag X^T X) * I        change = (G^-1 X^T R)^T

        Args:
            ridge: How firmly the weights are held, relative to the mean square of an input.
            centred: Whether a constant may be added to the outputs (`constant`); X and R are centred then.
        """
        xx, xr = self.xx, self.xr
        if not centred:
            xx = xx + self.count * self.mean_x[:, :, None] * self.mean_x[:, None, :]
            xr = xr + self.count * self.mean_x[:, :, None] * self.mean_r[:, None, :]
        diagonal = xx.diagonal(dim1=1, dim2=2)
        scale = diagonal.mean(dim=1)
        # Inputs that do not vary determine nothing.
        hold = torch.where(scale > 0, ridge * scale, torch.ones_like(scale))
        gram = xx + torch.diag_embed(hold[:, None].expand_as(diagonal))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed.any()):  # rounding, where the ridge is tiny
            return torch.linalg.lstsq(gram, xr).solution.mT
        return torch.cholesky_solve(xr, factor).mT

    def constant(self, weight: Tensor) -> Tensor:
        """What to add to the constants (G, K) along with a change of the weights."""
        return self.mean_r - (weight @ self.mean_x[:, :, None]).squeeze(-1)

    def error(self, weight: Tensor | None = None, constant: Tensor | None = None, *, centred: bool = False) -> float:
        """Relative error of the map after a change; that of the map as it is without one.

        Args:
            weight: Change of the weights (G, K, D).
            constant: Change of the constants (G, K).
            centred: Leave the mean of the error out: a batch norm behind the map takes it.

        Returns:
            Root of the squared error relative to the spread of the targets, or to their energy where they are constant.
        """
        squared, mean = self.rr, self.mean_r
        if weight is not None:
            squared = squared - 2 * (weight * self.xr.mT).sum(dim=-1) + ((weight @ self.xx) * weight).sum(dim=-1)
            mean = mean - (weight @ self.mean_x[:, :, None]).squeeze(-1)
        if constant is not None:
            mean = mean - constant
        wrong = squared.clamp(min=0).sum() + (0.0 if centred else self.count * mean.square().sum())
        spread, energy = self.tt.sum(), (self.tt + self.count * self.mean_t.square()).sum()
        reference = torch.where(spread > 1e-9 * energy, spread, energy)
        if not reference > 0:
            return 0.0 if wrong <= 0 else float("inf")
        return float((wrong / reference).sqrt())
