# A small ResNet (7 basic blocks in two stages) on Fashion-MNIST: trained in minutes on one core, then pruned.
#   python tools/create_mini_images.py fashion ~/.cache/mdp_mmdet3d/fashion_mnist
#   python tools/train.py configs/fashion_mnist/resnet_mdp.py --cfg-options randomness.seed=0
#   python tools/prune.py configs/fashion_mnist/resnet_mdp.py --checkpoint work_dirs/resnet_mdp/training/iter_938.pth
_base_ = ["./_base_.py"]

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="ResNet_CIFAR",
        depth=34,
        num_stages=2,
        stem_channels=16,
        base_channels=16,
        strides=(2, 2),
        dilations=(1, 1),
        out_indices=(1,),
        zero_init_residual=False,
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=32, loss=dict(type="CrossEntropyLoss")),
)

optim_wrapper = dict(optimizer=dict(type="AdamW", lr=4e-3, weight_decay=0.01))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, end=100, by_epoch=False),
    dict(type="CosineAnnealingLR", begin=100, end=938, by_epoch=False),
]

prune = dict(finetune=dict(lr=1e-3))
