"""The operator: weights, one call, a layer, their checks, their tuning, and the reference."""
