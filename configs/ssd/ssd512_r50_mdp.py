# SSD512 with ResNet-50 in place of VGG16, as the paper prunes it on Pascal VOC; see README.md in this folder.
#   python tools/create_mini_images.py voc data/mini_voc              # where the real data set is not at hand
#   VOC_ROOT=data/VOCdevkit python tools/prune.py configs/ssd/ssd512_r50_mdp.py --checkpoint YOURS.pth
_base_ = ["./ssd512_vgg_mdp.py"]

# Stage 3 keeps the stride of stage 2 (8), as in NVIDIA's SSD, so the first level is as fine as VGG's conv4_3.
model = dict(
    data_preprocessor=dict(std=[58.395, 57.12, 57.375]),
    backbone=dict(
        _delete_=True,
        type="ResNet",
        depth=50,
        num_stages=3,
        strides=(1, 2, 1),
        dilations=(1, 1, 1),
        out_indices=(2,),
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        zero_init_residual=False,
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=dict(
        in_channels=(1024,),
        out_channels=(1024, 512, 512, 256, 256, 256, 256),
        level_strides=(2, 2, 2, 2, 2, 1),
        level_paddings=(1, 1, 1, 1, 1, 1),
        l2_norm_scale=None,
    ),
    bbox_head=dict(in_channels=(1024, 512, 512, 256, 256, 256, 256)),
)
