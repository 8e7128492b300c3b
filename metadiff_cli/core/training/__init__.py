"""Training: the encoder, the hyper-parameters that validation domains choose, the denoiser."""
