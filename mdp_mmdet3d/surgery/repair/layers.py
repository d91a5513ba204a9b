"""Layers that can be refitted, each seen as a linear map from samples of its inputs to samples of its outputs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


@dataclass
class Layer(ABC):
    """One layer of the pruned model.

    Attributes:
        name: Path of the module.
        module: The module.
        to_norm: Whether a batch norm alone reads the outputs, so that their mean does not matter.
    """

    name: str
    module: nn.Module
    to_norm: bool = False

    channel_axis = -1
    """Axis of the channels in an output."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Groups, inputs and outputs of a group."""

    @property
    def centred(self) -> bool:
        """Whether the mean of the outputs is left out of the fit: it can be changed by itself, or does not matter."""
        return self.to_norm or self.has_constant

    @property
    def has_constant(self) -> bool:
        """Whether `change` can add a constant to the outputs."""
        return getattr(self.module, "bias", None) is not None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a fit changes, by its name in the model."""
        names = ("weight", "bias") if getattr(self.module, "bias", None) is not None else ("weight",)
        return {f"{self.name}.{name}": getattr(self.module, name).data for name in names}

    @property
    def kept(self) -> str:
        """Tensor whose axis `kept_axis` tells which outputs of the dense layer stay."""
        return "weight"

    kept_axis = 0

    def outputs(self, output: Tensor, where: Tensor) -> Tensor:
        """Channels (P, C) of an output at positions ``where`` (P,)."""
        return self.flat(output).index_select(0, where).float()

    def flat(self, output: Tensor) -> Tensor:
        """An output as (positions, channels)."""
        return output.movedim(self.channel_axis, -1).reshape(-1, output.shape[self.channel_axis])

    @abstractmethod
    def inputs(self, x: Tensor, output: Tensor, where: Tensor) -> Tensor:
        """Samples (G, P, D) of what the outputs at ``where`` depend on."""

    def grouped(self, rows: Tensor) -> Tensor:
        """Outputs (P, C) as (G, P, K)."""
        groups, _, outputs = self.shape
        return rows.reshape(-1, groups, outputs).transpose(0, 1)

    def bounded(self, weight: Tensor) -> Tensor:
        """A change of the weights, no larger than makes sense."""
        return weight

    def run(self, x: Tensor) -> Tensor:
        """Outputs of what a fit changes."""
        return self.module(x)

    @abstractmethod
    def change(self, weight: Tensor, constant: Tensor) -> None:
        """Add what `Moments.solve` found to the module."""


def add_to(tensor: Tensor, change: Tensor) -> None:
    """Add in float64, in place; the tensor keeps its type."""
    tensor.data.copy_((tensor.data.double() + change.to(tensor.device)).to(tensor.dtype))


class LinearLayer(Layer):
    """``nn.Linear``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Layer.shape`."""
        return 1, self.module.weight.shape[1], self.module.weight.shape[0]

    def inputs(self, x: Tensor, output: Tensor, where: Tensor) -> Tensor:
        """See `Layer.inputs`."""
        return x.reshape(-1, x.shape[-1]).index_select(0, where).float()[None]

    def change(self, weight: Tensor, constant: Tensor) -> None:
        """See `Layer.change`."""
        add_to(self.module.weight, weight[0])
        if self.module.bias is not None:
            add_to(self.module.bias, constant[0])


class ConvLayer(Layer):
    """Convolutions over one or two axes, with groups, and transposed ones, which are convolutions of an input that is
    stretched by zeros.
    """

    channel_axis = 1

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return isinstance(self.module, (nn.ConvTranspose1d, nn.ConvTranspose2d))

    @property
    def kept_axis(self) -> int:  # type: ignore[override]
        """See `Layer.kept_axis`."""
        return 1 if self.transposed else 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Layer.shape`."""
        groups, (first, second, *kernel) = self.module.groups, self.module.weight.shape
        inputs, outputs = (first // groups, second) if self.transposed else (second, first // groups)
        return groups, inputs * math.prod(kernel), outputs

    def inputs(self, x: Tensor, output: Tensor, where: Tensor) -> Tensor:
        """See `Layer.inputs`."""
        conv, groups = self.module, self.module.groups
        kernel, dilation = conv.kernel_size, conv.dilation
        x, grid = self._padded(x), output.shape[2:]
        stride = (1,) * len(grid) if self.transposed else conv.stride
        if len(grid) == 1:
            x, grid, kernel, stride, dilation = x[:, :, None], (1, *grid), (1, *kernel), (1, *stride), (1, *dilation)
        image, place = where // (grid[0] * grid[1]), where % (grid[0] * grid[1])
        row, column = place // grid[1] * stride[0], place % grid[1] * stride[1]
        taps = [
            x[image, :, row + i * dilation[0], column + j * dilation[1]].float()
            for i in range(kernel[0])
            for j in range(kernel[1])
        ]
        patches = torch.stack(taps, dim=-1)  # (P, C, taps)
        return patches.reshape(len(where), groups, -1).transpose(0, 1)

    def _padded(self, x: Tensor) -> Tensor:
        conv = self.module
        if not self.transposed:
            amounts = conv._reversed_padding_repeated_twice
            return F.pad(x, amounts, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
        axes = range(x.dim() - 2)
        size = [(x.shape[2 + a] - 1) * conv.stride[a] + 1 for a in axes]
        stretched = x.new_zeros(*x.shape[:2], *size)
        stretched[(..., *(slice(None, None, conv.stride[a]) for a in axes))] = x
        amounts = []
        for a in reversed(axes):
            edge = conv.dilation[a] * (conv.kernel_size[a] - 1) - conv.padding[a]
            amounts += [edge, edge + conv.output_padding[a]]
        return F.pad(stretched, amounts)

    def change(self, weight: Tensor, constant: Tensor) -> None:
        """See `Layer.change`."""
        conv = self.module
        groups, _, outputs = self.shape
        taps = weight.reshape(groups, outputs, -1, *conv.kernel_size)
        if self.transposed:  # (G, K, D, ...) to (G * D, K, ...), the kernel read from its end
            taps = taps.transpose(1, 2).flip([*range(3, taps.dim())])
        add_to(conv.weight, taps.reshape(conv.weight.shape))
        if conv.bias is not None:
            add_to(conv.bias, constant.flatten())


class NormLayer(Layer):
    """LayerNorm and GroupNorm: gain and offset of every channel by themselves."""

    @property
    def channel_axis(self) -> int:  # type: ignore[override]
        """See `Layer.channel_axis`."""
        return 1 if isinstance(self.module, nn.GroupNorm) else -1

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Layer.shape`."""
        return len(self.module.weight), 1, 1

    def inputs(self, x: Tensor, output: Tensor, where: Tensor) -> Tensor:
        """See `Layer.inputs`."""
        norm = self.module
        if isinstance(norm, nn.GroupNorm):
            plain = F.group_norm(x, norm.num_groups, eps=norm.eps)
        else:
            plain = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
        return self.grouped(self.outputs(plain, where))

    def change(self, weight: Tensor, constant: Tensor) -> None:
        """See `Layer.change`."""
        add_to(self.module.weight, weight.flatten())
        if self.module.bias is not None:
            add_to(self.module.bias, constant.flatten())


class BatchNormLayer(Layer):
    """BatchNorm: mean and variance of every channel, so that its outputs have again the dense ones' offset and scale.

    Gain and offset stay what they were trained to be: in training mode the batch sets the statistics.
    """

    channel_axis = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Layer.shape`."""
        return len(self.module.running_mean), 1, 1

    @property
    def has_constant(self) -> bool:
        """See `Layer.has_constant`."""
        return True

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Layer.tensors`."""
        return {f"{self.name}.{name}": getattr(self.module, name) for name in ("running_mean", "running_var")}

    @property
    def kept(self) -> str:
        """See `Layer.kept`."""
        return "running_mean"

    def inputs(self, x: Tensor, output: Tensor, where: Tensor) -> Tensor:
        """See `Layer.inputs`."""
        rows = self.outputs(output, where)
        return self.grouped(rows if self.module.bias is None else rows - self.module.bias.float())

    @property
    def gain(self) -> Tensor:
        """Of every channel, in float64."""
        norm = self.module
        return torch.ones_like(norm.running_mean).double() if norm.weight is None else norm.weight.data.double()

    @property
    def alive(self) -> Tensor:
        """Channels whose inputs show in the outputs."""
        return self.gain.abs() > 1e-3 * self.gain.abs().max()

    def bounded(self, weight: Tensor) -> Tensor:
        """See `Layer.bounded`."""
        return weight.clamp(-0.5, 1.0) * self.alive.to(weight)[:, None, None]

    def change(self, weight: Tensor, constant: Tensor) -> None:
        """See `Layer.change`."""
        norm, gain, alive = self.module, self.gain, self.alive
        deviation = (norm.running_var.double() + norm.eps).sqrt()
        scale, constant = 1 + weight.flatten(), constant.flatten()
        shift = torch.where(alive, constant * deviation / (gain * scale), torch.zeros_like(deviation))
        add_to(norm.running_mean, -shift)
        norm.running_var.copy_(((deviation / scale).square() - norm.eps).clamp(min=0))


@dataclass
class ResidualLayer(Layer):
    """The last layer of a residual branch, and the batch norm behind it, fitted once more, to the sum that they enter.

    So the branch makes up for what the other side of the sum lacks: a removed block, or a shortcut that lost channels.
    """

    map: LinearLayer | ConvLayer = None  # type: ignore[assignment]
    norm: BatchNormLayer | None = None

    @classmethod
    def of(cls, layer: LinearLayer | ConvLayer, norm: BatchNormLayer | None) -> ResidualLayer:
        """For a layer, and the batch norm behind it if there is one."""
        return cls(f"{layer.name} (sum)", layer.module, map=layer, norm=norm)

    @property
    def last(self) -> str:
        """Module whose output enters the sum."""
        return self.map.name if self.norm is None else self.norm.name

    @property
    def channel_axis(self) -> int:  # type: ignore[override]
        """See `Layer.channel_axis`."""
        return self.map.channel_axis

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Layer.shape`."""
        return self.map.shape

    @property
    def has_constant(self) -> bool:
        """See `Layer.has_constant`."""
        return self.norm is not None or self.map.has_constant

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Layer.tensors`."""
        return self.map.tensors if self.norm is None else {**self.map.tensors, **self.norm.tensors}

    def inputs(self, x: Tensor, output: Tensor, where: Tensor) -> Tensor:
        """See `Layer.inputs`."""
        return self.map.inputs(x, output, where)

    def run(self, x: Tensor) -> Tensor:
        """See `Layer.run`."""
        return self.map.run(x) if self.norm is None else self.norm.run(self.map.run(x))

    def bounded(self, weight: Tensor) -> Tensor:
        """See `Layer.bounded`."""
        if self.norm is None:
            return weight
        return weight * self.norm.alive.to(weight).reshape(*weight.shape[:2], 1)

    def change(self, weight: Tensor, constant: Tensor) -> None:
        """See `Layer.change`."""
        if self.norm is None:
            self.map.change(weight, constant)
            return
        gain = self.norm.gain / (self.norm.module.running_var.double() + self.norm.module.eps).sqrt()
        scale = torch.where(self.norm.alive, 1 / gain, torch.zeros_like(gain)).reshape(*weight.shape[:2], 1)
        self.map.change(weight * scale, torch.zeros_like(constant))
        self.norm.change(torch.zeros_like(constant).reshape(-1, 1, 1), constant.reshape(-1, 1))


def layer_of(name: str, module: nn.Module) -> Layer | None:
    """How to refit a module; None if it is no affine layer of a known kind."""
    if parametrize.is_parametrized(module) or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return None
    if isinstance(module, nn.Linear):
        return LinearLayer(name, module)
    if isinstance(module, CONVOLUTIONS):
        return ConvLayer(name, module)
    if isinstance(module, _BatchNorm) and module.running_mean is not None:
        return BatchNormLayer(name, module)
    if isinstance(module, nn.GroupNorm) and module.affine:
        return NormLayer(name, module)
    if isinstance(module, nn.LayerNorm) and module.weight is not None and module.weight.dim() == 1:
        return NormLayer(name, module)
    return None
