# DeiT-base of MMPretrain on ImageNet, its config as shipped: heads, q/k and v width, MLP, embedding width, sub-layers
# and layers.
#   python tools/create_mini_images.py imagenet data/mini_imagenet    # where the real data set is not at hand
#   python tools/prune.py configs/deit/deit-base_mdp.py --checkpoint deit-base_16xb64_in1k.pth
_base_ = ["mmpretrain::deit/deit-base_16xb64_in1k.py", "../_base_/datasets/imagenet.py"]

# Mixup and augmented labels are for training; importance takes the images as they are. The shipped initialisation of
# the classifier is 0: without a checkpoint nothing would be worth anything.
model = dict(train_cfg=None, head=dict(init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02)))
importance_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=248, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=224),
    dict(type="PackInputs"),
]
importance_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="ImageNet", data_root={{_base_.imagenet_root}}, split="train", pipeline=importance_pipeline),
)
train_dataloader = {{_base_.imagenet_data}}
val_dataloader = {{_base_.imagenet_data}}
test_dataloader = {{_base_.imagenet_data}}

prune = dict(budget=0.6, frames=8, input_size=(224, 224), max_options=8, channel_multiple=16, embed_width=True)
