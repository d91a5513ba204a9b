# FCOS3D R101 of MMDetection3D on nuScenes without its deformable convolutions; see README.md in this folder.
#   python tools/prune.py configs/fcos3d/fcos3d_r101_mdp.py --checkpoint YOURS.pth
_base_ = [
    "mmdet3d::fcos3d/fcos3d_r101-caffe-dcn_fpn_head-gn_8xb2-1x_nus-mono3d.py",
    "../_base_/datasets/nuscenes_frames.py",
]

# Deformable convolutions are in no ONNX graph that every runtime reads. The shipped initialisation makes every residual
# branch 0: without a checkpoint no block would be worth anything.
model = dict(
    backbone=dict(dcn=None, stage_with_dcn=(False, False, False, False), zero_init_residual=False),
    bbox_head=dict(dcn_on_last_conv=False),
)

data_root = {{_base_.nuscenes_root}}
train_dataloader = {{_base_.nuscenes_data}}
val_dataloader = {{_base_.nuscenes_data}}
test_dataloader = {{_base_.nuscenes_data}}
val_evaluator = {{_base_.nuscenes_evaluator}}
test_evaluator = {{_base_.nuscenes_evaluator}}

# Half of the camera's size, without the random flip. A 3D resize: cameras and depths follow.
importance_pipeline = [
    dict(type="LoadImageFromFileMono3D"),
    dict(
        type="LoadAnnotations3D",
        with_bbox=True,
        with_label=True,
        with_attr_label=True,
        with_bbox_3d=True,
        with_label_3d=True,
        with_bbox_depth=True,
    ),
    dict(type="RandomResize3D", scale=(800, 450), ratio_range=(1.0, 1.0), keep_ratio=True),
    dict(
        type="Pack3DDetInputs",
        keys=[
            "img",
            "gt_bboxes",
            "gt_bboxes_labels",
            "attr_labels",
            "gt_bboxes_3d",
            "gt_labels_3d",
            "centers_2d",
            "depths",
        ],
    ),
]
importance_dataloader = dict(
    dataset=dict(
        data_prefix=dict(
            pts="",
            CAM_FRONT="samples/CAM_FRONT",
            CAM_FRONT_LEFT="samples/CAM_FRONT_LEFT",
            CAM_FRONT_RIGHT="samples/CAM_FRONT_RIGHT",
            CAM_BACK="samples/CAM_BACK",
            CAM_BACK_RIGHT="samples/CAM_BACK_RIGHT",
            CAM_BACK_LEFT="samples/CAM_BACK_LEFT",
        ),
        load_type="mv_image_based",
        pipeline=importance_pipeline,
        metainfo={{_base_.metainfo}},
        modality={{_base_.input_modality}},
        box_type_3d="Camera",
        use_valid_flag=True,
    ),
)

prune = dict(budget=0.6, frames=8, input_size=(480, 800), num_cams=1, max_options=8, channel_multiple=16)
