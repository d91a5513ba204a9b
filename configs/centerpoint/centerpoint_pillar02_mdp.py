# CenterPoint with pillars of MMDetection3D on nuScenes: its dense part is pruned; see README.md in this folder.
#   python tools/prune.py configs/centerpoint/centerpoint_pillar02_mdp.py --checkpoint YOURS.pth
_base_ = [
    "mmdet3d::centerpoint/centerpoint_pillar02_second_secfpn_8xb4-cyclic-20e_nus-3d.py",
    "../_base_/datasets/nuscenes_frames.py",
]

data_root = {{_base_.nuscenes_root}}

# As shipped, but for the objects pasted into scenes, whose files tools/create_infos.py does not write.
db_sampler = None
points = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=5, use_dim=5),
    dict(
        type="LoadPointsFromMultiSweeps",
        sweeps_num=9,
        use_dim=[0, 1, 2, 3, 4],
        pad_empty_sweeps=True,
        remove_close=True,
    ),
    dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
]
augmentation = [
    dict(
        type="GlobalRotScaleTrans",
        rot_range=[-0.3925, 0.3925],
        scale_ratio_range=[0.95, 1.05],
        translation_std=[0, 0, 0],
    ),
    dict(type="RandomFlip3D", sync_2d=False, flip_ratio_bev_horizontal=0.5, flip_ratio_bev_vertical=0.5),
]
targets = [
    dict(type="PointsRangeFilter", point_cloud_range={{_base_.point_cloud_range}}),
    dict(type="ObjectRangeFilter", point_cloud_range={{_base_.point_cloud_range}}),
    dict(type="ObjectNameFilter", classes={{_base_.class_names}}),
]
pack = dict(type="Pack3DDetInputs", keys=["points", "gt_bboxes_3d", "gt_labels_3d"])
train_pipeline = [*points, *augmentation, *targets, dict(type="PointShuffle"), pack]
importance_pipeline = [*points, *targets, pack]

train_data = dict(
    type="NuScenesDataset",
    data_root={{_base_.nuscenes_root}},
    ann_file="nuscenes_infos_train.pkl",
    metainfo=dict(classes={{_base_.class_names}}),
    modality={{_base_.input_modality}},
    data_prefix={{_base_.data_prefix}},
    test_mode=False,
    use_valid_flag=True,
    box_type_3d="LiDAR",
)
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(dataset=dict(_delete_=True, **train_data, pipeline=train_pipeline)),
)
importance_dataloader = dict(dataset=dict(**train_data, pipeline=importance_pipeline))
val_dataloader = {{_base_.nuscenes_data}}
test_dataloader = {{_base_.nuscenes_data}}
val_evaluator = {{_base_.nuscenes_evaluator}}
test_evaluator = {{_base_.nuscenes_evaluator}}

# Cells of the pillar grid (height, width), not pixels.
prune = dict(budget=0.6, frames=8, input_size=(512, 512), num_cams=1, max_options=8, channel_multiple=16)
