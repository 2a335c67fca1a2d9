"""The page of a calibration: its charts, tables and warnings."""
