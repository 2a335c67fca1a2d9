"""What the command line shows: progress, answers, bundles, machines. Presentation only."""
