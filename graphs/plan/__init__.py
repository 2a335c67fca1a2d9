"""Plans: stages, edges, their rules and their costs, as frozen data; the standard library only."""

from .plan import StagePlan

__all__ = ["StagePlan"]
