_base_ = [
    "../_base_/models/streampetr_r50_704x256_900q.py",
    "../_base_/datasets/nuscenes_704x256.py",
    "../_base_/default_runtime.py",
]

val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
