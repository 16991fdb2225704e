"""Expert parallelism over torch.distributed: ExpertParallel, placements, and a planner."""

from moestro.parallel.expert_parallel import ExpertParallel
from moestro.parallel.placement import Placement, place

__all__ = ["ExpertParallel", "Placement", "place"]
