"""evenorm: batch normalisation for PyTorch, done completely."""

from importlib import import_module
from typing import TYPE_CHECKING

from evenorm.averages import Cumulative as Cumulative
from evenorm.averages import Exponential as Exponential
from evenorm.averages import Window as Window
from evenorm.environment import Info as Info
from evenorm.environment import info as info
from evenorm.functional import batch_norm as batch_norm
from evenorm.functional import mask_from_lengths as mask_from_lengths
from evenorm.functional import moments as moments
from evenorm.layers import BatchNorm as BatchNorm
from evenorm.layers import BatchNorm1d as BatchNorm1d
from evenorm.layers import BatchNorm2d as BatchNorm2d
from evenorm.layers import BatchNorm3d as BatchNorm3d
from evenorm.lazy import LazyBatchNorm1d as LazyBatchNorm1d
from evenorm.lazy import LazyBatchNorm2d as LazyBatchNorm2d
from evenorm.lazy import LazyBatchNorm3d as LazyBatchNorm3d
from evenorm.models.calibrate import calibrate as calibrate
from evenorm.models.calibration import Calibration as Calibration
from evenorm.models.convert import Conversion as Conversion
from evenorm.models.convert import conversion as conversion
from evenorm.models.convert import convert as convert
from evenorm.models.convert import revert as revert
from evenorm.models.fold import Folded as Folded
from evenorm.models.fold import fold as fold
from evenorm.models.freeze import freeze as freeze
from evenorm.models.freeze import unfreeze as unfreeze
from evenorm.models.merge import merge_statistics as merge_statistics
from evenorm.models.together import pool_running_statistics_ as pool_running_statistics_
from evenorm.models.together import set_process_group as set_process_group
from evenorm.moments import Moments as Moments
from evenorm.renorm import Renorm as Renorm
from evenorm.updates import no_update as no_update
from evenorm.updates import one_update as one_update
from evenorm.verify import verify_workers as verify_workers

if TYPE_CHECKING:
    from evenorm.doctor.diagnose import diagnose as diagnose
    from evenorm.doctor.diagnosis import Diagnosis as Diagnosis
    from evenorm.doctor.findings import Finding as Finding

__version__ = "0.1.0"
__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Calibration",
    "Conversion",
    "Cumulative",
    "Diagnosis",
    "Exponential",
    "Finding",
    "Folded",
    "Info",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Renorm",
    "Window",
    "batch_norm",
    "calibrate",
    "conversion",
    "convert",
    "diagnose",
    "fold",
    "freeze",
    "info",
    "mask_from_lengths",
    "merge_statistics",
    "moments",
    "no_update",
    "one_update",
    "pool_running_statistics_",
    "revert",
    "set_process_group",
    "unfreeze",
    "verify_workers",
]

# The doctor is a tool for a moment, and a third of what would have to be read: it is imported when it is called.
_LATER = {
    "diagnose": "evenorm.doctor.diagnose",
    "Diagnosis": "evenorm.doctor.diagnosis",
    "Finding": "evenorm.doctor.findings",
}


def __getattr__(name: str) -> object:
    """Import a public name of the doctor's at its first use."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
