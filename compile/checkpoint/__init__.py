"""Checkpoints: found, opened and read lazily; safetensors only. Dummies of published shapes."""
