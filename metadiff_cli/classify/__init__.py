"""From images to a classifier, shared by `metadiff adapt` and the Python class, so that both give the same results."""
