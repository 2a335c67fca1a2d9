"""Times of a bundle: where they go, and how far they are from what the machine can do."""
