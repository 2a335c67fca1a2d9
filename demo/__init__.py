"""The demo model, the scenes it was trained on and the script that trained it."""
