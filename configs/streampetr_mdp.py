# The main job: StreamPETR R50 704x256, pruned to a share of its dense latency on this machine.
#   python tools/prune.py configs/streampetr_mdp.py [--checkpoint F] [--budget 0.55 | 120ms | 8fps]
_base_ = ["./streampetr/streampetr_r50_704x256_428q.py"]

custom_imports = dict(imports=["projects.streampetr", "mdp_mmdet3d.runner"], allow_failed_imports=False)

# Weights of the dense model: a file, or None for random weights (the line runs, the plan is worth nothing).
checkpoint = None

prune = dict(
    budget=0.55,  # share of the dense latency, "120ms" or "8fps"
    frames=16,  # importance is accumulated over this many frames
    input_size=(256, 704),  # height, width at deployment
    num_cams=6,
    max_options=8,  # counts per dimension
    channel_multiple=16,  # the device's staircase
    head_width_multiple=8,
    freeze=[],  # shell patterns, e.g. "img_backbone.layer1.*"
)
