"""Named plans: static ones, and those that decide per prompt."""

from .presets import preset

__all__ = ["preset"]
