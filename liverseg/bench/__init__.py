"""Speed as ratios: liverseg against what limits it and against its peers, in one run."""
