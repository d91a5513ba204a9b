# An SSD of four levels on a narrow ResNet-18: trained in minutes on one core, then pruned.
#   python tools/create_mini_images.py fashion-voc data/fashion_voc
#   python tools/train.py configs/fashion_detection/ssd_mdp.py --cfg-options randomness.seed=0
#   python tools/prune.py configs/fashion_detection/ssd_mdp.py --checkpoint work_dirs/ssd_mdp/training/iter_1000.pth
_base_ = ["./_base_.py"]

custom_imports = dict(imports=["mdp_mmdet3d.runner", "mdp_mmdet3d.runner.ssd_head"], allow_failed_imports=False)

iterations = 1000  # of 16 images: 4 times through the 4,000 training images

model = dict(
    type="SingleStageDetector",
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(
        type="ResNet",
        depth=18,
        base_channels=16,
        num_stages=4,
        out_indices=(1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        zero_init_residual=False,
    ),
    neck=dict(
        type="SSDNeck",
        in_channels=(32, 64, 128),
        out_channels=(32, 64, 128, 64),
        level_strides=(2,),
        level_paddings=(1,),
        l2_norm_scale=None,
        norm_cfg=dict(type="BN"),
    ),
    bbox_head=dict(
        type="PredictingSSDHead",
        in_channels=(32, 64, 128, 64),
        num_classes=10,
        anchor_generator=dict(
            type="SSDAnchorGenerator",
            scale_major=False,
            input_size=128,
            strides=[8, 16, 32, 64],
            ratios=[[2], [2, 3], [2, 3], [2]],
            min_sizes=[18, 30, 46, 64],
            max_sizes=[30, 46, 64, 90],
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
    ),
    train_cfg=dict(
        assigner=dict(
            type="MaxIoUAssigner",
            pos_iou_thr=0.5,
            neg_iou_thr=0.5,
            min_pos_iou=0.0,
            ignore_iof_thr=-1,
            gt_max_assign_all=False,
        ),
        sampler=dict(type="PseudoSampler"),
        smoothl1_beta=1.0,
        allowed_border=-1,
        pos_weight=-1,
        neg_pos_ratio=3,
        debug=False,
    ),
    test_cfg=dict(nms=dict(type="nms", iou_threshold=0.45), min_bbox_size=0, score_thr=0.02, max_per_img=50),
)

optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.02), clip_grad=dict(max_norm=10)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, end=100, by_epoch=False),
    dict(type="CosineAnnealingLR", begin=100, end=iterations, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations)

prune = dict(finetune=dict(iterations=400, lr=5e-4, save_interval=200))
