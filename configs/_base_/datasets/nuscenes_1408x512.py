# As nuscenes_704x256.py at 1408x512 (R101).
_base_ = "./nuscenes_704x256.py"
final_shape = (512, 1408)

test_pipeline = [
    dict(type="LoadStreamImages"),
    dict(type="ResizeCropImages", final_shape=final_shape),
    dict(type="PackStreamInputs", keys=["img"]),
]
importance_pipeline = [
    dict(type="LoadStreamImages"),
    dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
    dict(type="ResizeCropImages", final_shape=final_shape),
    dict(type="ObjectRangeFilter", point_cloud_range={{_base_.point_cloud_range}}),
    dict(type="ObjectNameFilter", classes={{_base_.class_names}}),
    dict(type="PackStreamInputs"),
]

importance_dataloader = dict(dataset=dict(pipeline=importance_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
