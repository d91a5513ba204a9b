# DETR R50 of MMDetection on COCO, its config as shipped: what of it is pruned and what stays is in README.md here.
#   python tools/create_mini_images.py coco data/mini_coco            # where the real data set is not at hand
#   COCO_ROOT=data/coco python tools/prune.py configs/detr/detr_r50_mdp.py --checkpoint detr_r50_8xb2-150e_coco.pth
_base_ = ["mmdet::detr/detr_r50_8xb2-150e_coco.py", "../_base_/datasets/coco_512x320.py"]

# The shipped initialisation makes every residual branch 0: without a checkpoint no block would be worth anything.
model = dict(backbone=dict(zero_init_residual=False))

data_root = {{_base_.coco_root}}
train_dataloader = {{_base_.coco_data}}
val_dataloader = {{_base_.coco_data}}
test_dataloader = {{_base_.coco_data}}
val_evaluator = {{_base_.coco_evaluator}}
test_evaluator = {{_base_.coco_evaluator}}

prune = dict(
    budget=0.6,
    frames=8,
    input_size=(320, 512),
    max_options=8,
    channel_multiple=16,
    freeze=["decoder.layers.0.cross_attn"],  # queries have to see the image somewhere
)
