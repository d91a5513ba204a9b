# COCO for configs that take MMDetection's as shipped: `{{_base_.coco_data}}` and its evaluator go over theirs.
# COCO_ROOT names the folder; where the real data set is not at hand:
#   python tools/create_mini_images.py coco data/mini_coco
custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)
checkpoint = None

coco_root = (
    "{{$COCO_ROOT:REPOSITORY/data/mini_coco}}".replace("REPOSITORY", "{{ fileDirname }}".rsplit("/", 3)[0]) + "/"
)
coco_data = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=coco_root))
coco_evaluator = dict(ann_file=coco_root + "annotations/instances_val2017.json")

# Crops and random sizes are for training; importance takes the images as they are.
importance_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=coco_root,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="Resize", scale=(512, 320), keep_ratio=True),
            dict(type="PackDetInputs"),
        ],
    ),
)
