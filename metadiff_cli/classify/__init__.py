"""From image files to a classifier and predictions; shared by `adapt` and the Python class."""
