"""The contract: what a cache store holds and where its voxels are."""
