# Sliding-window training (the paper's): clips of 8 frames, gradients in the last 2; 8 GPUs x 1 clip, 24 epochs.
_base_ = "./streampetr_r50_704x256_900q_24e.py"
max_iters = 24 * (28130 // 8)

train_dataloader = dict(
    batch_size=1,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    batch_sampler=None,
    dataset=dict(
        _delete_=True,
        type="SlidingWindowDataset",
        dataset={{_base_.train_dataloader.dataset}},
        num_frames=8,
        num_dropped=1,
        grad_frames=2,
    ),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 3, begin=0, end=500, by_epoch=False),
    dict(type="CosineAnnealingLR", T_max=max_iters, begin=0, end=max_iters, eta_min_ratio=1e-3, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=28130 // 8))
