"""Method, encoders, training, evaluation and checkpoints, in torch: without a screen or a command line."""
