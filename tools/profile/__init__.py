"""How long a bundle takes, where the time goes, and how far that is from what a machine can do."""
