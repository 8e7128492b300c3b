"""The method: task space, denoisers, diffusion, guidance, adaptation to a task."""
