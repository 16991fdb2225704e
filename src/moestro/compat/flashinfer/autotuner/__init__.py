"""`flashinfer.autotuner`, import-compatible: every public name of it, over Moestro's tuner."""

from moestro.compat.flashinfer.autotuner.files import METADATA as _METADATA_KEY
from moestro.compat.flashinfer.autotuner.files import collect_metadata as _collect_metadata
from moestro.compat.flashinfer.autotuner.files import cudnn_version as _get_cudnn_backend_version
from moestro.compat.flashinfer.autotuner.files import hashable as _tactic_to_json_hashable
from moestro.compat.flashinfer.autotuner.files import mismatches as _classify_metadata_mismatches
from moestro.compat.flashinfer.autotuner.files import plain as _tactic_to_json
from moestro.compat.flashinfer.autotuner.files import tactic_of as _json_to_tactic
from moestro.compat.flashinfer.autotuner.initializers import (
    autotuner_initializer_empty,
    autotuner_initializer_ones,
    autotuner_initializer_rand,
    autotuner_initializer_rand_scaled,
    autotuner_initializer_randn,
    autotuner_initializer_zeros,
)
from moestro.compat.flashinfer.autotuner.tuner import (
    AutoTuner,
    ValueProfileArena,
    autotune,
    get_autotune_process_group,
    set_autotune_process_group,
)
from moestro.compat.profiles import ProfilingCacheKey
from moestro.tuning import (
    ConstraintSpec,
    DynamicDim,
    DynamicTensorSpec,
    OptimizationProfile,
    StaticDim,
    TunableRunner,
    TuningConfig,
    get_hybrid_num_tokens_buckets,
    is_in_profile_measurement,
    last_positive_power_of_2,
    make_bucket_mapper,
    map_to_hybrid_bucket,
    map_to_hybrid_bucket_uncapped,
    next_positive_power_of_2,
    round_to_nearest_bucket,
)
from moestro.tuning.lookup.known import Statistics as AutoTunerStatistics
from moestro.tuning.spec.specs import Dim

__all__ = [
    "_METADATA_KEY",
    "AutoTuner",
    "AutoTunerStatistics",
    "ConstraintSpec",
    "Dim",
    "DynamicDim",
    "DynamicTensorSpec",
    "OptimizationProfile",
    "ProfilingCacheKey",
    "StaticDim",
    "TunableRunner",
    "TuningConfig",
    "ValueProfileArena",
    "_classify_metadata_mismatches",
    "_collect_metadata",
    "_get_cudnn_backend_version",
    "_json_to_tactic",
    "_tactic_to_json",
    "_tactic_to_json_hashable",
    "autotune",
    "autotuner_initializer_empty",
    "autotuner_initializer_ones",
    "autotuner_initializer_rand",
    "autotuner_initializer_rand_scaled",
    "autotuner_initializer_randn",
    "autotuner_initializer_zeros",
    "get_autotune_process_group",
    "get_hybrid_num_tokens_buckets",
    "is_in_profile_measurement",
    "last_positive_power_of_2",
    "make_bucket_mapper",
    "map_to_hybrid_bucket",
    "map_to_hybrid_bucket_uncapped",
    "next_positive_power_of_2",
    "round_to_nearest_bucket",
    "set_autotune_process_group",
]
