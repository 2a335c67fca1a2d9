"""visistage: compile a multimodal LLM into stages with fixed visual-token counts, and run them."""

__version__ = "0.1.0"
