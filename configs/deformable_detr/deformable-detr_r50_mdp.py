# Deformable DETR R50 of MMDetection on COCO, its config as shipped; see README.md in this folder.
#   python tools/create_mini_images.py coco data/mini_coco            # where the real data set is not at hand
#   python tools/prune.py configs/deformable_detr/deformable-detr_r50_mdp.py --checkpoint YOURS.pth
_base_ = ["mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"]

custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)

checkpoint = None
repository = "{{ fileDirname }}".rsplit("/", 2)[0]
data_root = "{{$COCO_ROOT:REPOSITORY/data/mini_coco}}".replace("REPOSITORY", repository) + "/"

# The shipped initialisation makes every residual branch 0: without a checkpoint no block would be worth anything.
model = dict(backbone=dict(zero_init_residual=False))

train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

# Crops and random sizes are for training; importance takes the images as they are.
importance_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(512, 320), keep_ratio=True),
    dict(type="PackDetInputs"),
]
importance_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=importance_pipeline,
    ),
)

prune = dict(budget=0.6, frames=8, input_size=(320, 512), max_options=8, channel_multiple=16)
