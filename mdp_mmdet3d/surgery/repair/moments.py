"""Second moments of samples, and the ridge regression that they determine. Nothing else of a sample is kept."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Moments:
    """Of the inputs X of a linear map with independent groups, of what its outputs lack, R, and of the targets T.

    Sums are centred and kept in float64, so that neither the number of samples nor their mean costs digits.

    Args:
        groups: Groups G.
        inputs: Inputs D of a group.
        outputs: Outputs K of a group.
        device: Where the sums are kept.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.count = 0
        self.mean_x, self.mean_r, self.mean_t = zeros(inputs), zeros(outputs), zeros(outputs)
        self.xx, self.xr, self.rr, self.tt = (
            zeros(inputs, inputs),
            zeros(inputs, outputs),
            zeros(outputs),
            zeros(outputs),
        )

    def add(self, x: Tensor, r: Tensor, t: Tensor) -> None:
        """Add samples: X (G, P, D), R and T (G, P, K)."""
        count = x.shape[1]
        if count == 0:
            return
        means = [value.double().mean(dim=1) for value in (x, r, t)]
        x, r, t = (value - mean.to(value.dtype)[:, None] for value, mean in zip((x, r, t), means))
        between = self.count * count / (self.count + count)
        dx, dr, dt = (mean - own for mean, own in zip(means, (self.mean_x, self.mean_r, self.mean_t)))
        self.xx += (x.mT @ x).double() + between * dx[:, :, None] * dx[:, None, :]
        self.xr += (x.mT @ r).double() + between * dx[:, :, None] * dr[:, None, :]
        self.rr += r.double().square().sum(dim=1) + between * dr.square()
        self.tt += t.double().square().sum(dim=1) + between * dt.square()
        self.count += count
        for own, difference in ((self.mean_x, dx), (self.mean_r, dr), (self.mean_t, dt)):
            own += difference * (count / self.count)

    def reduce(self) -> None:
        """Make them the moments of the samples of all processes."""
        if not is_distributed():
            return
        total = torch.tensor(float(self.count), dtype=torch.float64, device=self.xx.device)
        dist.all_reduce(total)
        means = []
        for own in (self.mean_x, self.mean_r, self.mean_t):
            mean = own * (self.count / max(float(total), 1.0))
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
        self.count = round(float(total))

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
        return torch.linalg.solve(xx + torch.diag_embed(hold[:, None].expand_as(diagonal)), xr).mT

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


def is_distributed() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
