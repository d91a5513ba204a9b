# Fashion-MNIST for MMPretrain's classifiers at its own 28x28 pixels. Grey images become three equal channels, since the
# mean has three. What is deployed, and measured, takes one image at a time. FASHION_MNIST_ROOT names another folder.
_base_ = ["mmpretrain::_base_/default_runtime.py"]

custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)

data_root = "{{$FASHION_MNIST_ROOT:CACHE/fashion_mnist}}".replace("CACHE", "{{$HOME:.}}/.cache/mdp_mmdet3d")
checkpoint = None

data_preprocessor = dict(mean=[72.94] * 3, std=[90.02] * 3, to_rgb=False, num_classes=10)
_images = dict(
    type="FashionMNIST",
    data_root=data_root,
    download=False,
    serialize_data=False,  # one process needs no copy of it
)
_loader = dict(num_workers=0, collate_fn=dict(type="default_collate"))
_in_order = dict(type="DefaultSampler", shuffle=False)
_flip = dict(type="RandomFlip", prob=0.5, direction="horizontal")
_pack = dict(type="PackInputs")

train_dataloader = dict(
    **_loader,
    batch_size=128,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(**_images, pipeline=[_flip, _pack]),
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

iterations = 938  # twice through the 60,000 training images
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=200, max_keep_ckpts=2),
    logger=dict(type="LoggerHook", interval=100),
)
log_processor = dict(by_epoch=False)

prune = dict(
    budget=0.5,
    frames=32,
    input_size=(28, 28),
    channel_multiple=8,
    rounds=400,  # an image takes less than a millisecond
    importance=dict(type="loss", frames=8, max_frames=8),
    repair=dict(frames=256),
    evaluate=True,
    finetune=dict(iterations=469, save_interval=200),  # once through the training images
)
