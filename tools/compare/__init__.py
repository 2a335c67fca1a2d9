"""Plans of all methods side by side, at the same cost."""
