"""Data sets: the miniature nuScenes writer and the info files of MMDetection3D's v2 format."""
