"""What a person looks at: figures, a slice viewer, one HTML page."""
