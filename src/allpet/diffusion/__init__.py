"""Noise schedules, samplers and guidance. Nothing here knows a network: a denoiser is any function of (x_t, t)."""
