# The demo: the small StreamPETR that was trained on the easy miniature nuScenes, pruned, evaluated and fine-tuned.
#   python tools/create_mini_nuscenes.py data/mini_easy --easy
#   python tools/prune.py configs/streampetr_mini_mdp.py [--budget 0.55]
_base_ = ["./streampetr_mini.py"]

checkpoint = "{{ fileDirname }}".rsplit("/", 1)[0] + "/checkpoints/streampetr_mini.pth"

# The attention is aligned: neither the importance nor fine-tuning needs the guidance of a training from nothing.
model = dict(guidance=None)
custom_hooks = [dict(type="StreamStateHook")]

prune = dict(
    budget=0.55,  # share of the dense latency, "5ms" or "200fps"
    frames=200,  # importance is accumulated over this many frames
    input_size=(64, 176),  # height, width at deployment
    num_cams=6,
    max_options=8,  # counts per dimension
    channel_multiple=8,  # 8 channels are a block of ONNX Runtime's convolutions
    head_width_multiple=4,
    rounds=200,  # a frame takes milliseconds
    fit_networks=6,
    evaluate=True,  # mAP and NDS: dense, pruned, fine-tuned
    repair=dict(frames=240),  # more than by default: frames of this size cost little
    # A repaired model wants a smaller rate than one that was only cut, and keeps the statistics that fit its weights.
    finetune=dict(iterations=300, lr=4e-5, keep_statistics=True),
)
