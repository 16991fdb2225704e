"""The autotuner: which implementation of an operation, with which settings, is the fastest for the sizes at
hand.

It knows nothing of MoE and needs no torch to be imported; docs/tuning.md explains it.
"""

from moestro.tuning.measure.scope import is_in_profile_measurement
from moestro.tuning.spec.buckets import (
    get_hybrid_num_tokens_buckets,
    last_positive_power_of_2,
    make_bucket_mapper,
    make_tile_aware_buckets,
    map_to_hybrid_bucket,
    map_to_hybrid_bucket_uncapped,
    next_positive_power_of_2,
    round_to_nearest_bucket,
)
from moestro.tuning.spec.evidence import CandidateEvidence, Decision, Evidence
from moestro.tuning.spec.policy import MeasurementPolicy
from moestro.tuning.spec.runner import TunableRunner
from moestro.tuning.spec.specs import (
    ConstraintSpec,
    DynamicDim,
    DynamicTensorSpec,
    OptimizationProfile,
    Probe,
    StaticDim,
    TuningConfig,
)
from moestro.tuning.store.store import Store
from moestro.tuning.tuner import AutoTuner, autotune

__all__ = [
    "AutoTuner",
    "CandidateEvidence",
    "ConstraintSpec",
    "Decision",
    "DynamicDim",
    "DynamicTensorSpec",
    "Evidence",
    "MeasurementPolicy",
    "OptimizationProfile",
    "Probe",
    "StaticDim",
    "Store",
    "TunableRunner",
    "TuningConfig",
    "autotune",
    "get_hybrid_num_tokens_buckets",
    "is_in_profile_measurement",
    "last_positive_power_of_2",
    "make_bucket_mapper",
    "make_tile_aware_buckets",
    "map_to_hybrid_bucket",
    "map_to_hybrid_bucket_uncapped",
    "next_positive_power_of_2",
    "round_to_nearest_bucket",
]
