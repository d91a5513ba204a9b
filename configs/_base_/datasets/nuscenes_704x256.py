# nuScenes (or the miniature one) as a stream of six 704x256 images. NUSCENES_ROOT names another folder.
data_root = "{{$NUSCENES_ROOT:REPOSITORY/data/nuscenes}}".replace("REPOSITORY", "{{ fileDirname }}".rsplit("/", 3)[0])
point_cloud_range = [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]
class_names = [
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
]
metainfo = dict(classes=class_names)
input_modality = dict(use_camera=True, use_lidar=True)
final_shape = (256, 704)
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
# Ground truth without random augmentation: importance scores must be reproducible.
importance_pipeline = [
    dict(type="LoadStreamImages"),
    dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
    dict(type="ResizeCropImages", final_shape=final_shape),
    dict(type="ObjectRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="ObjectNameFilter", classes=class_names),
    dict(type="PackStreamInputs"),
]

importance_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="StreamNuScenesDataset",
        data_root=data_root,
        ann_file="nuscenes_infos_train.pkl",
        data_prefix=data_prefix,
        pipeline=importance_pipeline,
        metainfo=metainfo,
        modality=input_modality,
        test_mode=False,
        box_type_3d="LiDAR",
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=False,
    drop_last=False,
    sampler=dict(type="SceneSampler"),
    dataset=dict(
        type="StreamNuScenesDataset",
        data_root=data_root,
        ann_file="nuscenes_infos_val.pkl",
        data_prefix=data_prefix,
        pipeline=test_pipeline,
        metainfo=metainfo,
        modality=input_modality,
        test_mode=True,
        box_type_3d="LiDAR",
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(
    type="ClassSetNuScenesMetric",
    data_root=data_root,
    ann_file=data_root + "/nuscenes_infos_val.pkl",
    metric="bbox",
    modality=input_modality,
)
test_evaluator = val_evaluator
