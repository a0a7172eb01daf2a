"""One lower problem whose data lies on many workers."""
