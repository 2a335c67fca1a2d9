"""Output of commands: tables, bars and lines."""
