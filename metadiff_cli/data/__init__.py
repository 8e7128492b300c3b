"""Images on disk -> uint8 arrays and tensors: folders and splits, known benchmarks, the glyph generator."""
