# A single-frame detector like PETR from StreamPETR's parts, pruned; see README.md in this folder.
#   python tools/prune.py configs/petr/petr_r50_mdp.py --checkpoint YOURS.pth
_base_ = ["../streampetr/streampetr_r50_704x256_900q.py"]

custom_imports = dict(imports=["projects.streampetr", "mdp_mmdet3d.runner"], allow_failed_imports=False)

checkpoint = None

# No memory: nothing is propagated, nothing is kept.
model = dict(pts_bbox_head=dict(num_query=900, num_propagated=0, memory_len=0, topk_proposals=0))

prune = dict(budget=0.6, frames=16, input_size=(256, 704), num_cams=6, max_options=8, channel_multiple=16)
