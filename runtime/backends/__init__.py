"""Back ends: what runs a bundle's graphs on a CPU, and the choice among them."""
