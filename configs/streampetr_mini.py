# A StreamPETR small enough to learn the easy miniature nuScenes on a CPU.
#   python tools/create_mini_nuscenes.py data/mini_easy --easy
#   python tools/train.py configs/streampetr_mini.py
_base_ = ["./_base_/datasets/mini_176x64_train.py", "./_base_/default_runtime.py"]
custom_imports = dict(imports=["projects.streampetr", "mdp_mmdet3d.runner"], allow_failed_imports=False)
env_cfg = dict(dist_cfg=dict(backend="gloo"))

max_iters = 12000
model = dict(
    type="StreamPETR",
    data_preprocessor=dict(
        type="Det3DDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=16,
    ),
    # Trained from nothing: unlike the published models its batch norms learn.
    img_backbone=dict(
        type="mmdet.ResNet",
        depth=18,
        base_channels=16,
        num_stages=4,
        out_indices=(2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type="BN2d", requires_grad=True),
        norm_eval=False,
        style="pytorch",
        zero_init_residual=False,
    ),
    img_neck=dict(type="CPFPN", in_channels=[64, 128], out_channels=128),
    pts_bbox_head=dict(
        type="StreamPETRHead",
        num_classes=5,
        in_channels=128,
        embed_dims=128,
        num_query=60,
        num_propagated=20,
        memory_len=80,
        topk_proposals=20,
        stride=16,
        position_hidden_dims=512,
        pc_range={{_base_.point_cloud_range}},
        position_range=[-30.6, -30.6, -10.0, 30.6, 30.6, 10.0],
        intrinsics_tiling="camera_major",
        sine_temperature=20.0,
        decoder=dict(
            type="StreamPETRDecoder",
            num_layers=3,
            num_heads=8,
            ffn_hidden_dims=512,
            dropout=0.0,
            self_attn_drop=0.0,
            cross_attn_drop=0.0,
        ),
    ),
    bbox_coder=dict(type="StreamPETRBoxCoder", post_center_range=[-30.6, -30.6, -10.0, 30.6, 30.6, 10.0], max_num=100),
    criterion=dict(type="StreamPETRLoss"),
    denoising=dict(type="DenoisingGenerator", groups=5),
    img_roi_head=dict(type="AuxiliaryHead2D", in_channels=128, feat_channels=128),
    guidance=dict(type="AttentionGuidance", weight=1.0),
)

# Streams of five frames: long enough to fill the memory, short enough that two columns do not repeat one street.
train_dataloader = dict(dataset=dict(scene_parts=4))

optim_wrapper = dict(
    type="FiniteOptimWrapper",
    optimizer=dict(type="AdamW", lr=2.5e-4, weight_decay=0.01, fused=True),
    paramwise_cfg=dict(custom_keys=dict(img_backbone=dict(lr_mult=3.0))),
    clip_grad=dict(max_norm=35, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, begin=0, end=100, by_epoch=False),
    dict(type="CosineAnnealingLR", T_max=max_iters, begin=0, end=max_iters, eta_min_ratio=1e-3, by_epoch=False),
]
train_cfg = dict(type="StreamTrainLoop", max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1000, max_keep_ckpts=2),
)
custom_hooks = [dict(type="StreamStateHook"), dict(type="GuidanceHook", iterations=400)]
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
