# StreamPETR V2-99 800x320, 900 queries, 24 epochs from an FCOS3D backbone: published 57.1 NDS, 48.2 mAP.
_base_ = [
    "../_base_/models/streampetr_vov99_800x320_900q.py",
    "../_base_/datasets/nuscenes_800x320_train.py",
    "../_base_/schedules/adamw_24e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    pts_bbox_head=dict(decoder=dict(with_cp=True)),
    img_roi_head=dict(type="AuxiliaryHead2D"),
    grid_mask=dict(type="GridMask"),
)
load_from = "{{ fileDirname }}".rsplit("/", 2)[0] + "/ckpts/fcos3d_vovnet_imgbackbone-remapped.pth"
