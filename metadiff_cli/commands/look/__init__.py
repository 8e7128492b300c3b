"""The small commands: inspect, card, export, presets, config, data, cache, doctor."""
