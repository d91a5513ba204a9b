# nuScenes frame by frame for configs that take MMDetection3D's as shipped: `{{_base_.nuscenes_data}}` and
# `{{_base_.nuscenes_evaluator}}` go over theirs. NUSCENES_ROOT names the folder.
custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)
checkpoint = None

nuscenes_root = (
    "{{$NUSCENES_ROOT:REPOSITORY/data/nuscenes}}".replace("REPOSITORY", "{{ fileDirname }}".rsplit("/", 3)[0]) + "/"
)
nuscenes_data = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=nuscenes_root))
nuscenes_evaluator = dict(data_root=nuscenes_root, ann_file=nuscenes_root + "nuscenes_infos_val.pkl")

# A config gives the type of boxes and a pipeline without random augmentation.
importance_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="NuScenesDataset",
        data_root=nuscenes_root,
        ann_file="nuscenes_infos_train.pkl",
        test_mode=False,
    ),
)
