"""From a cache to a trained network."""
