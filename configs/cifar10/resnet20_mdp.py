# The public CIFAR-10 ResNet of 20 layers (91.8 %): 9 blocks in stages of 16, 32 and 64 channels.
#   python -m mdp_mmdet3d.runner.cifar_resnet resnet20.npz resnet20.pth
#   CIFAR10_ROOT=data/cifar10 python tools/prune.py configs/cifar10/resnet20_mdp.py --checkpoint resnet20.pth
_base_ = ["mmpretrain::_base_/default_runtime.py"]

custom_imports = dict(imports=["mdp_mmdet3d.runner", "mdp_mmdet3d.runner.cifar_resnet"], allow_failed_imports=False)

checkpoint = None
data_root = "{{$CIFAR10_ROOT:REPOSITORY/data/cifar10}}".replace("REPOSITORY", "{{ fileDirname }}".rsplit("/", 2)[0])

data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=False, num_classes=10)
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

_images = dict(type="CIFAR10", data_root=data_root, download=False, serialize_data=False)
_loader = dict(num_workers=0, collate_fn=dict(type="default_collate"))
_in_order = dict(type="DefaultSampler", shuffle=False)
_augment = [
    dict(type="RandomCrop", crop_size=32, padding=4),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
]
_pack = dict(type="PackInputs")

train_dataloader = dict(
    **_loader,
    batch_size=128,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(**_images, pipeline=[*_augment, _pack]),
)
# Importance, loss values and repair take training images as they are, the same ones each time.
importance_dataloader = dict(
    **_loader, batch_size=64, sampler=_in_order, dataset=dict(**_images, indices=2048, pipeline=[_pack])
)
test_dataloader = dict(
    **_loader,
    batch_size=256,
    sampler=_in_order,
    dataset=dict(**_images, split="test", test_mode=True, pipeline=[_pack]),
)
val_dataloader = test_dataloader
test_evaluator = dict(type="Accuracy", topk=(1,))
val_evaluator = test_evaluator

iterations = 7800  # 20 times through the 50,000 training images
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4))
param_scheduler = [dict(type="CosineAnnealingLR", end=iterations, by_epoch=False)]
default_hooks = dict(
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1000, max_keep_ckpts=2),
    logger=dict(type="LoggerHook", interval=100),
)
log_processor = dict(by_epoch=False)

prune = dict(
    budget=0.5,
    frames=32,
    input_size=(32, 32),
    channel_multiple=8,
    rounds=400,  # an image takes less than a millisecond
    importance=dict(type="loss", frames=8, max_frames=8),
    repair=dict(frames=256),
    evaluate=True,
    finetune=dict(iterations=390, lr=1e-2, save_interval=200),  # once through the training images
)
