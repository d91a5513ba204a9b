# ResNet-50 of MMPretrain on ImageNet, its config as shipped, pruned to a share of its latency on this machine.
#   python tools/create_mini_images.py imagenet data/mini_imagenet    # where the real data set is not at hand
#   python tools/prune.py configs/resnet/resnet50_mdp.py --checkpoint resnet50_8xb32_in1k.pth
_base_ = ["mmpretrain::resnet/resnet50_8xb32_in1k.py", "../_base_/datasets/imagenet.py"]

# The shipped initialisation makes every branch 0: without a checkpoint no block would be worth anything.
model = dict(backbone=dict(zero_init_residual=False))

train_dataloader = {{_base_.imagenet_data}}
val_dataloader = {{_base_.imagenet_data}}
test_dataloader = {{_base_.imagenet_data}}

prune = dict(budget=0.6, frames=8, input_size=(224, 224), max_options=8, channel_multiple=16)
