# ImageNet for configs that take MMPretrain's as shipped: `{{_base_.imagenet_data}}` goes over its loaders.
# IMAGENET_ROOT names the folder with train/ and val/; where the real data set is not at hand:
#   python tools/create_mini_images.py imagenet data/mini_imagenet
custom_imports = dict(imports=["mdp_mmdet3d.runner"], allow_failed_imports=False)
checkpoint = None

imagenet_root = "{{$IMAGENET_ROOT:REPOSITORY/data/mini_imagenet}}".replace(
    "REPOSITORY", "{{ fileDirname }}".rsplit("/", 3)[0]
)
imagenet_data = dict(batch_size=8, num_workers=0, persistent_workers=False, dataset=dict(data_root=imagenet_root))
