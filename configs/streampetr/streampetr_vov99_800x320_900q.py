_base_ = [
    "../_base_/models/streampetr_vov99_800x320_900q.py",
    "../_base_/datasets/nuscenes_800x320.py",
    "../_base_/default_runtime.py",
]

val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
