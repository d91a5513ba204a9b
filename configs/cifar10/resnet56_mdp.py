# The public CIFAR-10 ResNet of 56 layers (93.6 %): 27 blocks.
#   python -m mdp_mmdet3d.runner.cifar_resnet resnet56.npz resnet56.pth
#   CIFAR10_ROOT=data/cifar10 python tools/prune.py configs/cifar10/resnet56_mdp.py --checkpoint resnet56.pth
_base_ = ["./resnet20_mdp.py"]

model = dict(backbone=dict(depth=56))
