"""Moestro: fused Mixture-of-Experts layers and the autotuner that keeps them fast."""
