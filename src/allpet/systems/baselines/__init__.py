"""What the latent diffusion is compared with, on the same slices and with the same budget (arXiv 2509.09130, fig. 4).

VAE, GAN and score-based model, and what trivial generators reach: Gaussians, and the training slices themselves.
"""
