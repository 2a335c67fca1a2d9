"""Training of the demo model; not part of the wheel."""
