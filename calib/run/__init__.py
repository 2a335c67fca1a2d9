"""Layer-wise runs: many prompts through a plan, one layer's weights in memory."""
