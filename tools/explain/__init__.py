"""``visistage explain``: one answer, shown as a page. Reads a bundle through the runtime."""
