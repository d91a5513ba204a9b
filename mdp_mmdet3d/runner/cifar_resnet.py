"""Public CIFAR-10 ResNets as a backbone of MMPretrain, and their weights with shortcuts that can be cut."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from mmpretrain.models.backbones import ResNet_CIFAR
from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.registry import MODELS
from torch import Tensor

from mdp_mmdet3d.command_line import command
from mdp_mmdet3d.errors import FileFormatError
from mdp_mmdet3d.files import read_arrays
from mdp_mmdet3d.runner.outputs import write_checkpoint

EPS = 1e-5  # of batch norms


@MODELS.register_module()
class CifarResNet(ResNet_CIFAR):
    """ResNet for CIFAR of He et al. (2016), section 4.2: three stages of 16, 32 and 64 channels.

    Their shortcuts take every second pixel and pad the missing channels with zeros. Here they are convolutions with a
    batch norm, as in any other ResNet of MMPretrain, so that stages can be narrowed; `with_shortcuts` gives them the
    weights that compute the same.
    """

    arch_settings: ClassVar = {depth: (BasicBlock, ((depth - 2) // 6,) * 3) for depth in (20, 32, 44, 56, 110)}


def with_shortcuts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a public CIFAR-10 ResNet with its parameter-free shortcuts as convolutions and batch norms.

    Args:
        state: ``conv1``, ``bn1``, ``layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}``, ``linear``.

    Returns:
        The same and, where a stage begins wider than it gets its input, ``downsample.0``, a convolution of zeros and
        ones, and ``downsample.1``, a batch norm that changes nothing; ``linear`` is called ``fc``.

    Raises:
        FileFormatError: There are no such weights.
    """
    found = {name.replace("linear.", "fc."): tensor for name, tensor in state.items()}
    if not {"conv1.weight", "layer2.0.conv1.weight", "layer3.0.conv1.weight", "fc.weight"} <= found.keys():
        raise FileFormatError(
            "these are no weights of a CIFAR-10 ResNet: there is no conv1, layer2.0.conv1, layer3.0.conv1 or linear "
            f"among {', '.join(sorted(found)[:4])}, ..."
        )
    for stage in (2, 3):
        outputs, inputs = found[f"layer{stage}.0.conv1.weight"].shape[:2]
        before = (outputs - inputs) // 2  # as many zero channels in front as behind
        convolution = torch.zeros(outputs, inputs, 1, 1)
        convolution[before : before + inputs, :, 0, 0] = torch.eye(inputs)
        found |= {
            f"layer{stage}.0.downsample.0.weight": convolution,
            f"layer{stage}.0.downsample.1.weight": torch.full((outputs,), (1.0 + EPS) ** 0.5),
            f"layer{stage}.0.downsample.1.bias": torch.zeros(outputs),
            f"layer{stage}.0.downsample.1.running_mean": torch.zeros(outputs),
            f"layer{stage}.0.downsample.1.running_var": torch.ones(outputs),
        }
    return found


@command("nothing was written")
def main() -> int:
    """Write the arrays of an ``.npz`` file as a checkpoint for the configs of ``configs/cifar10``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("arrays", type=Path, help="resnet20.npz or resnet56.npz: the state dict as arrays")
    parser.add_argument("out", type=Path, help="e.g. resnet20.pth")
    args = parser.parse_args()
    arrays = read_arrays(args.arrays, what="weights", remedy="download or copy it again")
    try:
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except TypeError as error:
        raise FileFormatError(f"weights {args.arrays} hold more than numbers ({error})") from error
    write_checkpoint(args.out, {"meta": {}, "state_dict": with_shortcuts(state)})
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
