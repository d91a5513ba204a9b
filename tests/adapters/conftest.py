"""Models of other packages are built in their own scope; what runs afterwards has MMDetection3D's again."""

from __future__ import annotations

import pytest
from mmengine.registry import init_default_scope


@pytest.fixture(autouse=True)
def default_scope():
    yield
    init_default_scope("mmdet3d")
