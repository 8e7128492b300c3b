"""`metadiff pretrain` and `metadiff metatrain`."""
