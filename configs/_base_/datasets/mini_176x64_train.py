# The easy miniature nuScenes at its own size, without augmentation:
#   python tools/create_mini_nuscenes.py data/mini_easy --easy
data_root = "{{$MINI_NUSCENES_ROOT:REPOSITORY/data/mini_easy}}".replace(
    "REPOSITORY", "{{ fileDirname }}".rsplit("/", 3)[0]
)
class_names = ["car", "truck", "bus", "pedestrian", "traffic_cone"]
metainfo = dict(classes=class_names)
point_cloud_range = [-25.6, -25.6, -5.0, 25.6, 25.6, 3.0]
final_shape = (64, 176)
input_modality = dict(use_camera=True, use_lidar=True)
data_prefix = dict(
    pts="samples/LIDAR_TOP",
    sweeps="sweeps/LIDAR_TOP",
    CAM_FRONT="samples/CAM_FRONT",
    CAM_FRONT_RIGHT="samples/CAM_FRONT_RIGHT",
    CAM_FRONT_LEFT="samples/CAM_FRONT_LEFT",
    CAM_BACK="samples/CAM_BACK",
    CAM_BACK_LEFT="samples/CAM_BACK_LEFT",
    CAM_BACK_RIGHT="samples/CAM_BACK_RIGHT",
)

test_pipeline = [
    dict(type="LoadStreamImages"),
    dict(type="ResizeCropImages", final_shape=final_shape),
    dict(type="PackStreamInputs", keys=["img"]),
]
train_pipeline = [
    dict(type="LoadStreamImages"),
    dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
    dict(type="LoadImageObjects", classes=class_names),
    dict(type="ObjectRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="ObjectNameFilter", classes=class_names),
    dict(type="RandomResizeCropFlip", final_shape=final_shape, resize_range=(1.0, 1.0), flip_prob=0.0),
    dict(type="PackStreamInputs"),
]
_dataset = dict(
    type="StreamNuScenesDataset",
    data_root=data_root,
    data_prefix=data_prefix,
    metainfo=metainfo,
    modality=input_modality,
    box_type_3d="LiDAR",
)

train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler"),
    batch_sampler=dict(type="StreamBatchSampler"),
    dataset=dict(ann_file="nuscenes_infos_train.pkl", pipeline=train_pipeline, test_mode=False, **_dataset),
)
importance_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(ann_file="nuscenes_infos_train.pkl", pipeline=train_pipeline, test_mode=False, **_dataset),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    drop_last=False,
    sampler=dict(type="SceneSampler"),
    dataset=dict(ann_file="nuscenes_infos_val.pkl", pipeline=test_pipeline, test_mode=True, **_dataset),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="ClassSetNuScenesMetric",  # the devkit's mAP counts the five absent classes as 0
    data_root=data_root,
    ann_file=data_root + "/nuscenes_infos_val.pkl",
    metric="bbox",
    modality=input_modality,
)
test_evaluator = val_evaluator
