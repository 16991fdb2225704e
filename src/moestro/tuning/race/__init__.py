"""Who wins: rounds and their statistics; pure, driven by any timer."""
