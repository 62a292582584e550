"""The experiments, one file each. A new one is a new file and a new line here; the report keeps this order."""

from __future__ import annotations

from evenorm.lab.experiment import Experiment
from evenorm.lab.experiments import (
    affine,
    batch_size,
    exact,
    inference,
    init,
    input_scale,
    landscape,
    max_rate,
    noisy,
    overfitting,
    placement,
    shift,
    speed,
    weight_decay,
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        speed.EXPERIMENT,
        max_rate.EXPERIMENT,
        init.EXPERIMENT,
        input_scale.EXPERIMENT,
        shift.EXPERIMENT,
        noisy.EXPERIMENT,
        landscape.EXPERIMENT,
        affine.EXPERIMENT,
        placement.EXPERIMENT,
        inference.EXPERIMENT,
        batch_size.EXPERIMENT,
        overfitting.EXPERIMENT,
        weight_decay.EXPERIMENT,
        exact.EXPERIMENT,
    )
}
