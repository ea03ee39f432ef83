"""The mathematics of diffusion: schedules, losses, guidance and samplers. Knows no network."""
