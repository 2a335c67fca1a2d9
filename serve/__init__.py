"""A bundle behind HTTP: OpenAI's chat completions, health, metrics, and a page to try it."""
