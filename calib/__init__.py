"""Numbers measured on samples."""
