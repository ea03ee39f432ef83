"""The networks, one file each, and what they share. Know nothing of diffusion."""
