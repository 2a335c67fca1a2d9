"""On the workstation: a checkpoint becomes a bundle."""
