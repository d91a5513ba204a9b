# One real key frame (MDP_SHARED_DATA or ../shared/data) instead of a data set; all its files lie in one folder.
_base_ = './nuscenes_704x256.py'
data_root = '{{$MDP_SHARED_DATA:../shared/data}}/nuscenes_frame'
ann_file = 'n015-2018-07-24-11-22-45+0800.pkl'
data_prefix = dict(
    pts='', sweeps='', CAM_FRONT='', CAM_FRONT_RIGHT='', CAM_FRONT_LEFT='', CAM_BACK='', CAM_BACK_LEFT='',
    CAM_BACK_RIGHT='',
)

importance_dataloader = dict(dataset=dict(data_root=data_root, ann_file=ann_file, data_prefix=data_prefix))
val_dataloader = dict(dataset=dict(data_root=data_root, ann_file=ann_file, data_prefix=data_prefix))
test_dataloader = dict(dataset=dict(data_root=data_root, ann_file=ann_file, data_prefix=data_prefix))
val_evaluator = None
test_evaluator = None
