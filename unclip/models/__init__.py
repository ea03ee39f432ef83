"""The networks, one file each, and their shared parts, independent of diffusion."""
