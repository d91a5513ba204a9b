# nuScenes as streams for training at 800x320 (V2-99), with the official augmentation.
_base_ = "./nuscenes_800x320.py"

train_pipeline = [
    dict(type="LoadStreamImages"),
    dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
    dict(type="LoadImageObjects"),
    dict(type="ObjectRangeFilter", point_cloud_range={{_base_.point_cloud_range}}),
    dict(type="ObjectNameFilter", classes={{_base_.class_names}}),
    dict(type="RandomResizeCropFlip", final_shape={{_base_.final_shape}}, resize_range=(0.47, 0.625)),
    dict(type="RandomRotateScaleWorld", rotation_rad=(-0.3925, 0.3925), scale_range=(0.95, 1.05)),
    dict(type="PackStreamInputs"),
]

train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler"),
    batch_sampler=dict(type="StreamBatchSampler"),
    dataset=dict(
        type="StreamNuScenesDataset",
        data_root={{_base_.data_root}},
        ann_file="nuscenes_infos_train.pkl",
        data_prefix={{_base_.data_prefix}},
        pipeline=train_pipeline,
        metainfo={{_base_.metainfo}},
        modality={{_base_.input_modality}},
        test_mode=False,
        box_type_3d="LiDAR",
        scene_parts=2,
    ),
)
