"""Estimates of what a bundle or a model would take on a machine that is not at hand."""
