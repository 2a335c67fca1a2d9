"""What commands print: tables, bars and lines."""
