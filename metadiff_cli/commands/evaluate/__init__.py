"""`metadiff evaluate`."""
