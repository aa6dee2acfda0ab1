"""What a segmentation is worth: overlap, distances, lesions, and whether its uncertainty is."""
