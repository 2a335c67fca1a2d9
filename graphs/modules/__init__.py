"""The network in torch: decoder stages, the vision encoder, selection, and their operators."""
