"""evenorm: batch normalisation for PyTorch, done completely."""

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
from evenorm.models.freeze import freeze as freeze
from evenorm.models.freeze import unfreeze as unfreeze
from evenorm.models.merge import merge_statistics as merge_statistics
from evenorm.moments import Moments as Moments
from evenorm.renorm import Renorm as Renorm
from evenorm.updates import no_update as no_update
from evenorm.updates import one_update as one_update

__version__ = "0.1.0"
__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Calibration",
    "Cumulative",
    "Exponential",
    "Info",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Renorm",
    "Window",
    "batch_norm",
    "calibrate",
    "freeze",
    "info",
    "mask_from_lengths",
    "merge_statistics",
    "moments",
    "no_update",
    "one_update",
    "unfreeze",
]
