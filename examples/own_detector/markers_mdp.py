# The example's detector, pruned to half of its latency:  python tools/prune.py examples/own_detector/markers_mdp.py
# Python has to find the package `own_detector`: PYTHONPATH=examples/own_detector.
custom_imports = dict(imports=["own_detector", "mdp_mmdet3d.runner"], allow_failed_imports=False)
default_scope = "mmengine"

model = dict(type="MarkerDetector", data_preprocessor=dict(type="ImgDataPreprocessor"))


def _loader(count, seed, shuffle):
    return dict(
        batch_size=4,
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=shuffle),
        dataset=dict(type="MarkerImages", count=count, seed=seed),
    )


train_dataloader = _loader(64, 0, True)
importance_dataloader = _loader(16, 1, False)
test_dataloader = _loader(32, 2, False)
test_evaluator = dict(type="MarkerRecall")
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type="Adam", lr=1e-3))
train_cfg = dict(type="IterBasedTrainLoop", max_iters=60)

prune = dict(budget=0.5, frames=8, input_size=(64, 64), max_options=4, channel_multiple=8, rounds=20, evaluate=True)
