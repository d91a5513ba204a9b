# StreamPETR R50 704x256, 900 queries, 24 epochs from ImageNet: published 47.6 NDS, 37.5 mAP.
_base_ = [
    "../_base_/models/streampetr_r50_704x256_900q.py",
    "../_base_/datasets/nuscenes_704x256_train.py",
    "../_base_/schedules/adamw_24e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    img_backbone=dict(with_cp=True, init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50")),
    pts_bbox_head=dict(decoder=dict(with_cp=True)),
    img_roi_head=dict(type="AuxiliaryHead2D"),
    grid_mask=dict(type="GridMask"),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(img_backbone=dict(lr_mult=0.25))))
