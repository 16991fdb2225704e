"""`flashinfer.autotuner.initializers`: how dynamic inputs get their values."""

from moestro.tuning.spec.initializers import empty as autotuner_initializer_empty
from moestro.tuning.spec.initializers import ones as autotuner_initializer_ones
from moestro.tuning.spec.initializers import rand as autotuner_initializer_rand
from moestro.tuning.spec.initializers import rand_scaled as autotuner_initializer_rand_scaled
from moestro.tuning.spec.initializers import randn as autotuner_initializer_randn
from moestro.tuning.spec.initializers import zeros as autotuner_initializer_zeros
from moestro.tuning.spec.specs import Initializer as TensorInitializer

__all__ = [
    "TensorInitializer",
    "autotuner_initializer_empty",
    "autotuner_initializer_ones",
    "autotuner_initializer_rand",
    "autotuner_initializer_rand_scaled",
    "autotuner_initializer_randn",
    "autotuner_initializer_zeros",
]
