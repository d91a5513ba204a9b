"""Errors of the package: each says what is wrong, where, the value, and what to do."""

from __future__ import annotations


class MdpError(Exception):
    """Base class: anything a user can mend. Tools print it without a traceback and exit with status 2."""


class FileFormatError(MdpError):
    """A file is truncated, corrupt, of another kind or of an unknown version."""


class StructureMismatchError(MdpError):
    """Two things do not belong together: a plan, table, importance or checkpoint of another model."""


class MissingDatasetError(MdpError):
    """The data set that a config names is not there."""


class WriteError(MdpError):
    """A file cannot be written: the disk is full or read-only, or the folder is not ours."""


class InfeasibleBudgetError(MdpError):
    """No allowed structure reaches the budget.

    Attributes:
        minimum: Smallest reachable value of the violated metric, in the metric's unit (milliseconds for latency).
    """

    def __init__(self, message: str, minimum: float) -> None:
        super().__init__(message)
        self.minimum = minimum


class DeploymentError(MdpError):
    """A model cannot be exported as asked, or an input does not fit an engine."""


class MissingExtraError(MdpError, ImportError):
    """A package of an optional part (``pip install 'mdp_mmdet3d[EXTRA]'``) is not installed."""
