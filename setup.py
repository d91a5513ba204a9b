"""Packaging. The dependencies are those of a user who already has, or wants, MMDetection3D."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mdp_mmdet3d",
    version="0.1.0",
    description="Latency-constrained multi-dimensional pruning of 3D detectors for MMDetection3D",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mdp_mmdet3d*", "projects*"]),
    package_data={"mdp_mmdet3d": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "numpy>=1.23",
        "scipy>=1.9",
        # Wheels bring SCIP itself. Tested: 6.3.0 (CI) and 5.5.0. Model.getMajorVersion is not in 5.0: all that reaches
        # SCIP fails there, 11 of 60 small problems.
        "pyscipopt>=5.5",
        "torch>=2.1",
        "torch-pruning>=1.5,<2",
        "mmengine>=0.10,<0.11",
        "mmcv>=2.0.0rc4,<2.2",
        "mmdet>=3.0,<3.4",
        "mmdet3d>=1.4,<1.5",
        "onnx>=1.15",
        "onnxruntime>=1.16",
        "onnxslim>=0.1.30",
        "rich>=13",
        "matplotlib>=3.6",
        "pillow>=9",
        "pyyaml>=6",
    ],
    extras_require={
        "rtx": ["tensorrt-rtx-cu13>=1.7,<1.8"],
        "classification": ["mmpretrain>=1.2,<1.3", "timm>=1.0"],
        "dev": ["pytest>=8", "pytest-timeout", "hypothesis>=6", "ruff", "mypy", "types-PyYAML"],
    },
)
