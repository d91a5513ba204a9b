"""The error of this package."""

from __future__ import annotations

from mdp_mmdet3d.errors import MdpError


class DeploymentError(MdpError):
    """A model cannot be exported as asked, or an input does not fit an engine."""
