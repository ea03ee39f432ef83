"""The mathematics of diffusion: schedules, losses, samplers, inversion, inpainting. No networks."""
