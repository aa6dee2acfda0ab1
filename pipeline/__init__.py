"""Raw CT to cached tensors: streamed, resampled, written once."""
