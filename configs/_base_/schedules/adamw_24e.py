# 24 "epochs" of nuScenes (28130 frames) at a total batch of 16, e.g. 8 GPUs with 2 streams each.
iters_per_epoch = 28130 // 16
max_iters = 24 * iters_per_epoch

optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="float16",
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", lr=4e-4, weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(img_backbone=dict(lr_mult=0.1))),
    clip_grad=dict(max_norm=35, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, begin=0, end=500, by_epoch=False),
    dict(type="CosineAnnealingLR", T_max=max_iters, begin=0, end=max_iters, eta_min_ratio=1e-3, by_epoch=False),
]
# The model is evaluated once, at the end.
train_cfg = dict(type="StreamTrainLoop", max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=iters_per_epoch, max_keep_ckpts=3),
)
custom_hooks = [dict(type="StreamStateHook")]
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
