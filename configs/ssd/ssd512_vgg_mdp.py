# SSD512 with VGG16 of MMDetection on Pascal VOC 07+12, its config as shipped. VOC_ROOT names the VOCdevkit folder.
#   python tools/create_mini_images.py voc data/mini_voc              # where the real data set is not at hand
#   VOC_ROOT=data/VOCdevkit python tools/prune.py configs/ssd/ssd512_vgg_mdp.py --checkpoint ssd512_voc0712.pth
_base_ = ["mmdet::pascal_voc/ssd512_voc0712.py"]

custom_imports = dict(imports=["mdp_mmdet3d.runner", "mdp_mmdet3d.runner.ssd_head"], allow_failed_imports=False)
model = dict(bbox_head=dict(type="PredictingSSDHead"))  # that of MMDetection 3.3 cannot predict

checkpoint = None
data_root = "{{$VOC_ROOT:REPOSITORY/data/mini_voc}}".replace("REPOSITORY", "{{ fileDirname }}".rsplit("/", 2)[0]) + "/"

trainval = [
    dict(
        type="VOCDataset",
        data_root=data_root,
        ann_file=f"VOC{year}/ImageSets/Main/trainval.txt",
        data_prefix=dict(sub_data_root=f"VOC{year}/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline={{_base_.train_pipeline}},
    )
    for year in (2007, 2012)
]
train_dataloader = dict(dataset=dict(dataset=dict(datasets=trainval)))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

# Expansion, crops and colours are for training; importance takes the images as they are, and of one year, so that each
# frame is another image.
importance_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(512, 512), keep_ratio=False),
    dict(type="PackDetInputs"),
]
importance_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="VOCDataset",
        data_root=data_root,
        ann_file="VOC2007/ImageSets/Main/trainval.txt",
        data_prefix=dict(sub_data_root="VOC2007/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=importance_pipeline,
    ),
)

prune = dict(budget=0.6, frames=8, input_size=(512, 512), max_options=8, channel_multiple=16)
