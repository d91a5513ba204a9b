"""Packaging. The extra `all` has the dependencies of a user who already has, or wants, MMDetection3D."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "mdp_mmdet3d/__init__.py").read_text(encoding="utf-8"), re.M)
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))

# Wheels bring SCIP itself. Tested: 6.3.0 (CI) and 5.5.0. Model.getMajorVersion is not in 5.0: all that reaches SCIP
# fails there, 11 of 60 small problems.
SOLVER = ["pyscipopt>=5.5"]
LATENCY = ["onnx>=1.15", "onnxruntime>=1.16", "rich>=13"]
# mmcv is not in it: its operators are compiled for the torch that is there, which pip's isolated build of its source
# package does not find, so that pip would install nothing at all. `extras.needs` names the remedy.
ALL = [
    *SOLVER,
    *LATENCY,
    "scipy>=1.9",
    "torch>=2.1",
    "torch-pruning>=1.5,<2",
    "mmengine>=0.10,<0.11",
    "mmdet>=3.0,<3.4",
    "mmdet3d>=1.4,<1.5",
    "onnxslim>=0.1.30",
    "matplotlib>=3.6",
    "jinja2>=3",  # report.html
    "pillow>=9",
    "pydantic>=2.6,<3",  # the prune section
    "pyyaml>=6",
]

setup(
    name="mdp_mmdet3d",
    version=VERSION[1],
    description="Latency-constrained multi-dimensional pruning of 3D detectors for MMDetection3D",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # `projects` is a namespace, shared with the projects of an MMDetection3D checkout.
    packages=[
        *find_packages(include=["mdp_mmdet3d*"]),
        *find_namespace_packages(include=["projects.*"], exclude=["*.__pycache__"]),
        "mdp_mmdet3d_tools",
    ],
    package_dir={"mdp_mmdet3d_tools": "tools"},
    entry_points={
        "console_scripts": [f"mdp-{name.replace('_', '-')} = mdp_mmdet3d.extras:{name}" for name in TOOLS],
    },
    # .mim, where OpenMMLab's packages keep configs, holds links to configs/ and checkpoints/.
    package_data={
        "mdp_mmdet3d": [
            "py.typed",
            "report/templates/*",
            *(f".mim/configs/{'*/' * n}*.py" for n in range(4)),
            ".mim/checkpoints/*.pth",
        ],
        "mdp_mmdet3d_tools": ["build_mmcv.sh"],
    },
    python_requires=">=3.10",
    # Alone it reads and writes plans, tables and problems; what it does with them is in the extras.
    install_requires=["numpy>=1.23"],
    extras_require={
        "solver": SOLVER,
        "latency": LATENCY,
        "all": ALL,
        "rtx": ["tensorrt-rtx-cu13>=1.7,<1.8"],
        "classification": ["mmpretrain>=1.2,<1.3", "timm>=1.0"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
        "dev": ["pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis>=6", "ruff", "mypy", "types-PyYAML"],
    },
)
