# A small ViT (6 layers of 4 heads, patches of 7x7 pixels) on Fashion-MNIST: trained in minutes on a core, then pruned.
#   python tools/create_mini_images.py fashion ~/.cache/mdp_mmdet3d/fashion_mnist
#   python tools/train.py configs/fashion_mnist/vit_mdp.py --cfg-options randomness.seed=0
#   python tools/prune.py configs/fashion_mnist/vit_mdp.py --checkpoint work_dirs/vit_mdp/training/iter_469.pth
_base_ = ["./_base_.py"]

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="VisionTransformer",
        arch=dict(embed_dims=64, num_layers=6, num_heads=4, feedforward_channels=128),
        img_size=28,
        patch_size=7,
    ),
    head=dict(
        type="VisionTransformerClsHead",
        num_classes=10,
        in_channels=64,
        init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02),
        loss=dict(type="CrossEntropyLoss"),
    ),
)

optim_wrapper = dict(optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.01), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, end=100, by_epoch=False),
    dict(type="CosineAnnealingLR", begin=100, end=469, by_epoch=False),
]

train_cfg = dict(max_iters=469, val_interval=469)

prune = dict(head_width_multiple=4, finetune=dict(lr=5e-4))
