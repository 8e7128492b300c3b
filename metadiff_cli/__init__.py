"""metadiff: few-shot image classification by diffusion over classifier weights."""

__version__ = "0.1.0"
