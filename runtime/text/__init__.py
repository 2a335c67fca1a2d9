"""Text: chat template, tokens of a prompt, sampling, and tokens back to text."""
