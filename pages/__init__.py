"""What the pages that people read have in common: style, words, charts."""
