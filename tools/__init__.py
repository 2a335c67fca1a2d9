"""Tools on finished bundles: verify, profile, estimate, explain."""
