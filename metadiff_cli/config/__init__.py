"""Settings: the schema, and the layers that are laid over it."""
