# StreamPETR R50 704x256, 428 queries, 24 epochs from the nuImages backbone: 8 GPUs x 2 streams.
_base_ = [
    "../_base_/models/streampetr_r50_704x256_428q.py",
    "../_base_/datasets/nuscenes_704x256_train.py",
    "../_base_/schedules/adamw_24e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    img_backbone=dict(
        with_cp=True,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="{{ fileDirname }}".rsplit("/", 2)[0]
            + "/ckpts/cascade_mask_rcnn_r50_fpn_coco-20e_20e_nuim_20201009_124951-40963960.pth",
            prefix="backbone.",
        ),
    ),
    pts_bbox_head=dict(decoder=dict(with_cp=True)),
    img_roi_head=dict(type="AuxiliaryHead2D"),
    grid_mask=dict(type="GridMask"),
)
