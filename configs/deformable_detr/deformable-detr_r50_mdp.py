# Deformable DETR R50 of MMDetection on COCO, its config as shipped; see README.md in this folder.
#   python tools/create_mini_images.py coco data/mini_coco            # where the real data set is not at hand
#   python tools/prune.py configs/deformable_detr/deformable-detr_r50_mdp.py --checkpoint YOURS.pth
_base_ = ["mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", "../_base_/datasets/coco_512x320.py"]

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
