# A small Deformable DETR (64 channels, 2 encoder and 3 decoder layers, 20 queries) on a narrow ResNet-18.
#   python tools/create_mini_images.py fashion-voc data/fashion_voc
#   python tools/train.py configs/fashion_detection/deformable_detr_mdp.py --cfg-options randomness.seed=0
#   python tools/prune.py configs/fashion_detection/deformable_detr_mdp.py \
#       --checkpoint work_dirs/deformable_detr_mdp/training/iter_3000.pth
_base_ = ["./_base_.py"]

iterations = 3000  # of 8 images: 6 times through the 4,000 training images
_attention = dict(embed_dims=64, num_levels=2, num_heads=4, dropout=0.0, batch_first=True)
_ffn = dict(embed_dims=64, feedforward_channels=128, ffn_drop=0.0)

model = dict(
    type="DeformableDETR",
    data_preprocessor={{_base_.data_preprocessor}},
    num_queries=20,
    num_feature_levels=2,
    with_box_refine=True,
    as_two_stage=False,
    backbone=dict(
        type="ResNet",
        depth=18,
        base_channels=16,
        num_stages=4,
        out_indices=(2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        zero_init_residual=False,
    ),
    neck=dict(
        type="ChannelMapper",
        in_channels=[64, 128],
        kernel_size=1,
        out_channels=64,
        act_cfg=None,
        norm_cfg=dict(type="GN", num_groups=8),
        num_outs=2,
    ),
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=_attention, ffn_cfg=_ffn)),
    decoder=dict(
        num_layers=3,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=64, num_heads=4, dropout=0.0, batch_first=True),
            cross_attn_cfg=_attention,
            ffn_cfg=_ffn,
        ),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=32, normalize=True, offset=-0.5),
    bbox_head=dict(
        type="DeformableDETRHead",
        num_classes=10,
        embed_dims=64,
        sync_cls_avg_factor=True,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="FocalLossCost", weight=2.0),
                dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
                dict(type="IoUCost", iou_mode="giou", weight=2.0),
            ],
        )
    ),
    test_cfg=dict(max_per_img=40),
)

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=7e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=0.5),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, end=200, by_epoch=False),
    dict(type="CosineAnnealingLR", begin=200, end=iterations, by_epoch=False),
]
train_dataloader = dict(batch_size=8)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations)

prune = dict(
    freeze=["decoder.layers.0.cross_attn"],  # queries have to see the image somewhere
    finetune=dict(iterations=400, lr=2e-4, save_interval=200),
)
