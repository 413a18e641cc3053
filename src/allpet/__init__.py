"""ALL-PET: few-shot PET foundation models in the projection domain (arXiv 2509.09130).

Public names are listed in ``_EXPORTS`` and imported on first use, so that ``import allpet`` stays
light for data-loader workers and for tools that only need the geometry.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "geometry": ["ParallelBeam"],
    "projector": ["Radon"],
    "reconstruction": ["fbp", "mlem", "osem"],
    "augmentation": ["SYMMETRY_LABEL_SIZE", "MaskedStack", "RadonMaskAugmentation", "SymmetryAugmentation"],
    "mixup": ["MIXUP_LABEL_SIZE", "MixupAugmentation"],
    "attention": ["TransparentMedicalAttention"],
    "regions": ["roi_box", "roi_from_file", "roi_from_labels"],
    "batches": ["PromptBatch", "SinogramBatch"],
    "prompts": ["Prompt"],
    "scaling": ["Scaling"],
    "consistency": ["bow_tie_filter", "half_turn_residual", "helgason_ludwig_residual"],
    "models.autoencoder": ["Autoencoder"],
    "models.denoiser": ["Denoiser"],
    "diffusion.schedule": ["Diffusion"],
    "diffusion.samplers": ["sample_ddim", "sample_ddpm", "sample_multistep"],
    "diffusion.bridge": ["Bridge"],
    "diffusion.bridge_samplers": ["sample_dbim"],
    "systems.autoencoder": ["AutoencoderSystem"],
    "systems.latent_diffusion": ["LatentDiffusion"],
    "systems.sampling": ["Sampling"],
    "systems.cost": ["sampling_cost", "training_flops"],
    "systems.baselines.gan": ["SinogramGAN"],
    "systems.baselines.gaussian": ["PCAGaussian"],
    "systems.baselines.resampling": ["ResampledSlices"],
    "systems.baselines.score": ["ScoreModel", "ScoreSampling"],
    "systems.baselines.vae_prior": ["VAEPrior"],
    "conditions": ["Condition", "RestorationBatch"],
    "models.pixel_space": ["PixelSpace"],
    "systems.focus": ["AttentionUse"],
    "systems.paired": ["Restored"],
    "systems.latent_bridge": ["BridgeSampling", "LatentBridge"],
    "systems.prior_restoration": ["PriorRestoration"],
    "systems.pair_synthesis": ["synthesise_pairs"],
    "systems.conditional_diffusion": ["ConditionalDiffusion", "ConditionalSampling"],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from the module it lives in (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'allpet' has no attribute {name!r}; its names are {', '.join(__all__)}.")
    return getattr(import_module(f"allpet.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
