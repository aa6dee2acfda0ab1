"""A trained network applied to scans, scored and shown."""
