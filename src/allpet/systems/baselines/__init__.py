"""What the latent diffusion is compared with (arXiv 2509.09130, fig. 4: VAE, GAN, score-based), and what trivial
generators reach on the same slices: a Gaussian over principal components, and the slices themselves.
"""
