_base_ = ["./streampetr_r50_704x256_900q.py"]

model = dict(
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395], bgr_to_rgb=False),
    img_backbone=dict(_delete_=True, type="VoVNet", spec_name="V-99-eSE", out_features=["stage4", "stage5"]),
    img_neck=dict(in_channels=[768, 1024]),
)
