"""From pixels to features: networks, encoders of other libraries, the feature bank."""
