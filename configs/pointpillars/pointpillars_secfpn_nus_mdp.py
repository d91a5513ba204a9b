# PointPillars with SECFPN of MMDetection3D on nuScenes: its dense part is pruned; see README.md in this folder.
#   python tools/prune.py configs/pointpillars/pointpillars_secfpn_nus_mdp.py --checkpoint YOURS.pth
_base_ = [
    "mmdet3d::pointpillars/pointpillars_hv_secfpn_sbn-all_8xb4-2x_nus-3d.py",
    "../_base_/datasets/nuscenes_frames.py",
]

data_root = {{_base_.nuscenes_root}}
train_dataloader = {{_base_.nuscenes_data}}
val_dataloader = {{_base_.nuscenes_data}}
test_dataloader = {{_base_.nuscenes_data}}
val_evaluator = {{_base_.nuscenes_evaluator}}
test_evaluator = {{_base_.nuscenes_evaluator}}

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
    dataset=dict(
        pipeline=importance_pipeline,
        metainfo={{_base_.metainfo}},
        modality={{_base_.input_modality}},
        data_prefix={{_base_.data_prefix}},
        box_type_3d="LiDAR",
    ),
)

# Cells of the pillar grid (height, width), not pixels.
prune = dict(budget=0.6, frames=8, input_size=(400, 400), num_cams=1, max_options=8, channel_multiple=16)
