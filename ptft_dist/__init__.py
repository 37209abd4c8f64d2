"""ptft_dist: one recipe, one loop, from one CPU to many nodes."""

__version__ = "0.1.0"
