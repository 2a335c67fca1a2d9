"""Quantisation: scales, integers, FP16 ranges, and the calibration file that holds them."""
