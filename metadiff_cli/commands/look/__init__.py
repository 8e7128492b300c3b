"""Commands that look at things: inspect, presets, config, data, cache, doctor, export."""
