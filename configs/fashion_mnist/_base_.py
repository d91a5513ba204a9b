# Fashion-MNIST for MMPretrain's classifiers at its own 28x28 pixels. Grey images become three equal channels, since the
# mean has three. What is deployed, and measured, takes one image at a time. FASHION_MNIST_ROOT names another folder.
_base_ = ["mmpretrain::_base_/default_runtime.py"]

custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)

data_root = "{{$FASHION_MNIST_ROOT:CACHE/fashion_mnist}}".replace("CACHE", "{{$HOME:.}}/.cache/mdp_mmdet3d")
checkpoint = None

data_preprocessor = dict(mean=[72.94] * 3, std=[90.02] * 3, to_rgb=False, num_classes=10)
train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="FashionMNIST",
        data_root=data_root,
        download=False,
        serialize_data=False,  # one process needs no copy of it
        pipeline=[dict(type="RandomFlip", prob=0.5, direction="horizontal"), dict(type="PackInputs")],
    ),
)
# Importance, loss values and repair take training images as they are, the same ones each time.
importance_dataloader = dict(
    batch_size=64,
    num_workers=0,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="FashionMNIST",
        data_root=data_root,
        download=False,
        indices=2048,
        serialize_data=False,
        pipeline=[dict(type="PackInputs")],
    ),
)
test_dataloader = dict(
    batch_size=256,
    num_workers=0,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="FashionMNIST",
        data_root=data_root,
        split="test",
        download=False,
        serialize_data=False,
        pipeline=[dict(type="PackInputs")],
        test_mode=True,
    ),
)
val_dataloader = test_dataloader
test_evaluator = dict(type="Accuracy", topk=(1,))
val_evaluator = test_evaluator

iterations = 938  # twice through the 60,000 training images
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=200, max_keep_ckpts=2),
    logger=dict(type="LoggerHook", interval=100),
)
log_processor = dict(by_epoch=False)
