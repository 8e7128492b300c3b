"""Files of weights: models, classifiers, baselines, ONNX graphs."""
