"""Training loops: encoder, denoiser, what is fitted afterwards, several processes."""
