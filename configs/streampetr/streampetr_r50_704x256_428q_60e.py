# As the 24-epoch configuration, for 60 epochs: the published 54.6 NDS, 44.9 mAP.
_base_ = "./streampetr_r50_704x256_428q_24e.py"
max_iters = 60 * (28130 // 16)

param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, begin=0, end=500, by_epoch=False),
    dict(type="CosineAnnealingLR", T_max=max_iters, begin=0, end=max_iters, eta_min_ratio=1e-3, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
