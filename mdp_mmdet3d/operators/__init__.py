"""One file per kind of operator: its widths and attributes, its work, its ONNX probe and its PyTorch call.

Importing this needs numpy only: torch is imported by the method that builds a call, onnx not at all.
"""

from mdp_mmdet3d.operators.attention import Attention
from mdp_mmdet3d.operators.base import OPERATORS, GraphBuilder, OperatorKind, OperatorSignature, Work
from mdp_mmdet3d.operators.call import Call, Call1, Call2, Call3
from mdp_mmdet3d.operators.conv import Conv, ConvGeometry
from mdp_mmdet3d.operators.depthwise_conv import DepthwiseConv
from mdp_mmdet3d.operators.ffn import Ffn
from mdp_mmdet3d.operators.grouped_conv import GroupedConv
from mdp_mmdet3d.operators.linear import Linear
from mdp_mmdet3d.operators.opened import OPENED
from mdp_mmdet3d.operators.pool import MaxPool
from mdp_mmdet3d.operators.upsample import UpsampleAdd

_PRODUCTS = (Conv(), DepthwiseConv(), GroupedConv(), Linear(), Attention(), Ffn(), *OPENED)
for _kind in (*_PRODUCTS, MaxPool(), UpsampleAdd(), Call1(), Call2(), Call3()):
    OPERATORS[_kind.name] = _kind

__all__ = [
    "OPERATORS",
    "Attention",
    "Call",
    "Conv",
    "ConvGeometry",
    "DepthwiseConv",
    "Ffn",
    "GraphBuilder",
    "GroupedConv",
    "Linear",
    "MaxPool",
    "OperatorKind",
    "OperatorSignature",
    "UpsampleAdd",
    "Work",
]
