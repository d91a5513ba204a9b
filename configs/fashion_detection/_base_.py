# Fashion-MNIST's objects on textured backgrounds, 128x128 pixels, for MMDetection's detectors; one image at a time is
# deployed and measured. FASHION_VOC_ROOT names another folder.
#   python tools/create_mini_images.py fashion-voc data/fashion_voc
_base_ = ["mmdet::_base_/default_runtime.py"]

custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)

checkpoint = None
data_root = (
    "{{$FASHION_VOC_ROOT:REPOSITORY/data/fashion_voc}}".replace("REPOSITORY", "{{ fileDirname }}".rsplit("/", 2)[0])
    + "/"
)
classes = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

data_preprocessor = dict(
    type="DetDataPreprocessor", mean=[110.0] * 3, std=[60.0] * 3, bgr_to_rgb=True, pad_size_divisor=1
)
_images = dict(
    type="VOCDataset",
    data_root=data_root,
    data_prefix=dict(sub_data_root=""),
    metainfo=dict(classes=classes),
    serialize_data=False,  # one process needs no copy of it
)
_loader = dict(num_workers=0)
_in_order = dict(type="DefaultSampler", shuffle=False)
_load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(128, 128), keep_ratio=False),  # nothing to do; it tells the scale
]
_tell = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")

train_dataloader = dict(
    **_loader,
    batch_size=16,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **_images,
        ann_file="ImageSets/Main/train.txt",
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[*_load, dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")],
    ),
)
# Importance, loss values and repair take training images as they are, the same ones each time.
importance_dataloader = dict(
    **_loader,
    batch_size=8,
    sampler=_in_order,
    dataset=dict(
        **_images,
        ann_file="ImageSets/Main/train.txt",
        indices=512,
        pipeline=[*_load, dict(type="PackDetInputs", meta_keys=_tell)],
    ),
)
test_dataloader = dict(
    **_loader,
    batch_size=20,
    sampler=_in_order,
    dataset=dict(
        **_images,
        ann_file="ImageSets/Main/test.txt",
        indices=400,  # of 1,000, so that many plans can be evaluated; None: all
        test_mode=True,
        pipeline=[*_load, dict(type="PackDetInputs", meta_keys=_tell)],
    ),
)
val_dataloader = test_dataloader
test_evaluator = dict(type="VOCMetric", metric="mAP", eval_mode="area")
val_evaluator = test_evaluator

val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=500, max_keep_ckpts=2),
    logger=dict(type="LoggerHook", interval=100),
)
log_processor = dict(by_epoch=False)

prune = dict(
    budget=0.5,
    frames=16,
    input_size=(128, 128),
    channel_multiple=8,
    max_options=8,
    rounds=200,  # an image takes a few milliseconds
    importance=dict(type="loss", frames=8, max_frames=8),
    repair=dict(frames=128),
    evaluate=True,
)
