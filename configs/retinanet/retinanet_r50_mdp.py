# RetinaNet R50 FPN of MMDetection on COCO, its config as shipped, pruned to a share of its latency on this machine.
#   python tools/create_mini_images.py coco data/mini_coco            # where the real data set is not at hand
#   python tools/prune.py configs/retinanet/retinanet_r50_mdp.py --checkpoint retinanet_r50_fpn_1x_coco.pth
_base_ = ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"]

custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)

checkpoint = None
data_root = "{{ fileDirname }}".rsplit("/", 2)[0] + "/data/mini_coco/"

# The shipped initialisation makes every residual branch 0: without a checkpoint no block would be worth anything.
model = dict(backbone=dict(zero_init_residual=False))

train_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

prune = dict(budget=0.6, frames=8, input_size=(320, 512), max_options=8, channel_multiple=16)
