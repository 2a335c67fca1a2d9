"""The search for a plan: dynamics, candidates, their measurement, and the choice."""
