"""Images: decoded within bounds, and preprocessed as the checkpoint's processor does it."""
