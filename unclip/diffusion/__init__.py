"""The mathematics of diffusion: schedules, losses, guidance, samplers, inversion, painting. Knows no network."""
