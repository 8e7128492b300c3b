"""`metadiff adapt`."""
