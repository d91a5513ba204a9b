# The public CIFAR-10 ResNet of 20 layers (91.8 %): 9 blocks in stages of 16, 32 and 64 channels. Loaders and settings
# are those of the other small images, Fashion-MNIST.
#   python -m mdp_mmdet3d.runner.cifar_resnet resnet20.npz resnet20.pth
#   CIFAR10_ROOT=data/cifar10 python tools/prune.py configs/cifar10/resnet20_mdp.py --checkpoint resnet20.pth
_base_ = ["../fashion_mnist/_base_.py"]

custom_imports = dict(imports=["mdp_mmdet3d.runner", "mdp_mmdet3d.runner.cifar_resnet"], allow_failed_imports=False)
data_root = "{{$CIFAR10_ROOT:REPOSITORY/data/cifar10}}".replace("REPOSITORY", "{{ fileDirname }}".rsplit("/", 2)[0])
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="CifarResNet",
        depth=20,
        num_stages=3,
        stem_channels=16,
        base_channels=16,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        zero_init_residual=False,
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=64, loss=dict(type="CrossEntropyLoss")),
)

_images = dict(dataset=dict(type="CIFAR10", data_root=data_root))
_augment = [
    dict(type="RandomCrop", crop_size=32, padding=4),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
train_dataloader = dict(dataset=dict(**_images["dataset"], pipeline=_augment))
importance_dataloader = _images
test_dataloader = _images
val_dataloader = _images

iterations = 7800  # 20 times through the 50,000 training images
train_cfg = dict(max_iters=iterations, val_interval=iterations)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4))
param_scheduler = [dict(type="CosineAnnealingLR", end=iterations, by_epoch=False)]

prune = dict(input_size=(32, 32), finetune=dict(iterations=390, lr=1e-2))  # fine-tuned once through the training images
