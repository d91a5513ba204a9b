custom_imports = dict(imports=["projects.streampetr"], allow_failed_imports=False)

point_cloud_range = [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]
position_range = [-61.2, -61.2, -10.0, 61.2, 61.2, 10.0]
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

model = dict(
    type="StreamPETR",
    data_preprocessor=dict(
        type="Det3DDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    img_backbone=dict(
        type="mmdet.ResNet",
        depth=50,
        num_stages=4,
        out_indices=(2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type="BN2d", requires_grad=False),
        norm_eval=True,
        style="pytorch",
        # Zeroed last norms would make the blocks of an untrained model worthless to a pruner.
        zero_init_residual=False,
    ),
    img_neck=dict(type="CPFPN", in_channels=[1024, 2048], out_channels=256),
    pts_bbox_head=dict(
        type="StreamPETRHead",
        num_classes=10,
        in_channels=256,
        embed_dims=256,
        num_query=300,
        num_propagated=128,
        memory_len=512,
        topk_proposals=128,
        stride=16,
        depth_num=64,
        depth_start=1.0,
        use_lid=True,
        pc_range=point_cloud_range,
        position_range=position_range,
        code_weights=[2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        # Both as the official checkpoints need them.
        intrinsics_tiling="camera_minor",
        eps=1e-5,
        decoder=dict(
            type="StreamPETRDecoder",
            num_layers=6,
            num_heads=8,
            ffn_hidden_dims=2048,
            dropout=0.1,
            self_attn_drop=0.1,
            cross_attn_drop=0.0,
        ),
    ),
    bbox_coder=dict(type="StreamPETRBoxCoder", post_center_range=position_range, max_num=300),
    criterion=dict(
        type="StreamPETRLoss",
        loss_cls=dict(type="mmdet.FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        bbox_weight=0.25,
        dn_weight=1.0,
        assigner=dict(type="StreamPETRHungarianAssigner", cls_weight=2.0, bbox_weight=0.25),
    ),
    denoising=dict(type="DenoisingGenerator", groups=10, noise_scale=1.0, noise_trans=0.0, split=0.75),
)
