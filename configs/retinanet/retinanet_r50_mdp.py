# RetinaNet R50 FPN of MMDetection on COCO, its config as shipped, pruned to a share of its latency on this machine.
#   python tools/create_mini_images.py coco data/mini_coco            # where the real data set is not at hand
#   python tools/prune.py configs/retinanet/retinanet_r50_mdp.py --checkpoint retinanet_r50_fpn_1x_coco.pth
_base_ = ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", "../_base_/datasets/coco_512x320.py"]

# The shipped initialisation makes every residual branch 0: without a checkpoint no block would be worth anything.
model = dict(backbone=dict(zero_init_residual=False))

data_root = {{_base_.coco_root}}
train_dataloader = {{_base_.coco_data}}
val_dataloader = {{_base_.coco_data}}
test_dataloader = {{_base_.coco_data}}
val_evaluator = {{_base_.coco_evaluator}}
test_evaluator = {{_base_.coco_evaluator}}

prune = dict(budget=0.6, frames=8, input_size=(320, 512), max_options=8, channel_multiple=16)
