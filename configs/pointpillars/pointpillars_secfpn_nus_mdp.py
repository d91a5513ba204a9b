# PointPillars with SECFPN of MMDetection3D on nuScenes: its dense part is pruned; see README.md in this folder.
#   python tools/prune.py configs/pointpillars/pointpillars_secfpn_nus_mdp.py --checkpoint YOURS.pth
_base_ = ["mmdet3d::pointpillars/pointpillars_hv_secfpn_sbn-all_8xb4-2x_nus-3d.py"]

custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)

checkpoint = None
repository = "{{ fileDirname }}".rsplit("/", 2)[0]
data_root = "{{$NUSCENES_ROOT:REPOSITORY/data/nuscenes}}".replace("REPOSITORY", repository) + "/"

train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(data_root=data_root, ann_file=data_root + "nuscenes_infos_val.pkl")
test_evaluator = val_evaluator

# Rotations, flips and shuffled points are for training; importance takes the points as they are.
importance_pipeline = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=5, use_dim=5),
    dict(type="LoadPointsFromMultiSweeps", sweeps_num=10, test_mode=True),
    dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
    dict(type="PointsRangeFilter", point_cloud_range={{_base_.point_cloud_range}}),
    dict(type="ObjectRangeFilter", point_cloud_range={{_base_.point_cloud_range}}),
    dict(type="ObjectNameFilter", classes={{_base_.class_names}}),
    dict(type="Pack3DDetInputs", keys=["points", "gt_bboxes_3d", "gt_labels_3d"]),
]
importance_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="NuScenesDataset",
        data_root=data_root,
        ann_file="nuscenes_infos_train.pkl",
        pipeline=importance_pipeline,
        metainfo={{_base_.metainfo}},
        modality={{_base_.input_modality}},
        data_prefix={{_base_.data_prefix}},
        test_mode=False,
        box_type_3d="LiDAR",
    ),
)

# Cells of the pillar grid (height, width), not pixels.
prune = dict(budget=0.6, frames=8, input_size=(400, 400), num_cams=1, max_options=8, channel_multiple=16)
