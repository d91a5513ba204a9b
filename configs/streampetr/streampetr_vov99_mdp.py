# StreamPETR V2-99 800x320, pruned to a share of its dense latency on this machine; see README.md in this folder.
#   python tools/prune.py configs/streampetr/streampetr_vov99_mdp.py --checkpoint YOURS.pth
_base_ = ["./streampetr_vov99_800x320_900q.py"]

custom_imports = dict(imports=["projects.streampetr", "mdp_mmdet3d.runner"], allow_failed_imports=False)

checkpoint = None

prune = dict(budget=0.6, frames=16, input_size=(320, 800), num_cams=6, max_options=8, channel_multiple=16)
