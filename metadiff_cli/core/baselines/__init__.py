"""The gradient-based family: MAML, ANIL, Meta-SGD."""
