# The main job on the one real nuScenes frame of the shared test data (MDP_SHARED_DATA) instead of a data set.
_base_ = "./streampetr_mdp.py"

_frame = dict(
    data_root="{{$MDP_SHARED_DATA:REPOSITORY/../shared/data}}/nuscenes_frame".replace(
        "REPOSITORY/..", "{{ fileDirname }}".rsplit("/", 2)[0]
    ),
    ann_file="n015-2018-07-24-11-22-45+0800.pkl",
    data_prefix=dict(
        pts="",
        sweeps="",
        CAM_FRONT="",
        CAM_FRONT_RIGHT="",
        CAM_FRONT_LEFT="",
        CAM_BACK="",
        CAM_BACK_LEFT="",
        CAM_BACK_RIGHT="",
    ),
)
importance_dataloader = dict(dataset=_frame)
val_dataloader = dict(dataset=_frame)
test_dataloader = dict(dataset=_frame)

prune = dict(frames=1)
