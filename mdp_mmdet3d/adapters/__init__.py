"""What the line knows about a kind of model: the protocol, its default for plain image networks, how one is found."""

from mdp_mmdet3d.adapters.base import RANDOM, Adapter, register_adapter
from mdp_mmdet3d.adapters.bird_eye import BirdEye
from mdp_mmdet3d.adapters.deploy_options import DeployOptions
from mdp_mmdet3d.adapters.find import adapter_of, trace_space
from mdp_mmdet3d.adapters.single_graph import SingleGraph
from mdp_mmdet3d.adapters.training_loss import TrainingLoss
from mdp_mmdet3d.space.builder import InputShape

__all__ = [
    "RANDOM",
    "Adapter",
    "BirdEye",
    "DeployOptions",
    "InputShape",
    "SingleGraph",
    "TrainingLoss",
    "adapter_of",
    "register_adapter",
    "trace_space",
]
