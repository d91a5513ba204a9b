# R50's 900 queries with ResNet-101 and the larger image; see README.md in this folder.
_base_ = [
    "../_base_/models/streampetr_r50_704x256_900q.py",
    "../_base_/datasets/nuscenes_1408x512.py",
    "../_base_/default_runtime.py",
]

model = dict(img_backbone=dict(depth=101))

val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
