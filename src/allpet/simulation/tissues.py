"""Tissues: the labels, attenuation and texture of everything a phantom is painted with.

Attenuation coefficients hold for 511 keV and a narrow beam. Sources: PMC3572388, table 2, for lung, fat, soft tissue,
brain, liver, spongy bone and skull; PMC3006167, table 1, for air and cortical bone.
"""

from __future__ import annotations

from typing import NamedTuple


class Tissue(NamedTuple):
    """What a tissue is made of.

    Attributes:
        label: integer in label rasters, 1-255; 0 is air.
        mu: linear attenuation coefficient at 511 keV, 1/mm.
        texture: coefficient of variation of the activity inside the tissue of one patient.
        uptake: name of the row of a tracer's table that holds its uptake; empty if it takes up nothing.
    """

    label: int
    mu: float
    texture: float
    uptake: str


_SOFT = 0.0098
TISSUES: dict[str, Tissue] = {
    "air": Tissue(0, 1e-5, 0.0, ""),
    "fat": Tissue(1, 0.0090, 0.10, "fat"),
    "muscle": Tissue(2, _SOFT, 0.12, "muscle"),
    "skin": Tissue(3, _SOFT, 0.10, "skin"),
    "skull": Tissue(4, 0.0145, 0.10, "skull"),
    "cortical_bone": Tissue(5, 0.0172, 0.05, "bone"),
    "marrow": Tissue(6, 0.0112, 0.12, "marrow"),
    "rib": Tissue(7, 0.0130, 0.12, "marrow"),
    "csf": Tissue(8, 0.0096, 0.0, "csf"),
    "grey_matter": Tissue(9, 0.0099, 0.06, "grey_matter"),
    "white_matter": Tissue(10, 0.0099, 0.05, "white_matter"),
    "caudate": Tissue(11, 0.0099, 0.05, "caudate"),
    "putamen": Tissue(12, 0.0099, 0.05, "putamen"),
    "thalamus": Tissue(13, 0.0099, 0.05, "thalamus"),
    "cerebellum": Tissue(14, 0.0099, 0.06, "cerebellum"),
    "lung": Tissue(15, 0.0026, 0.15, "lung"),
    "blood": Tissue(16, _SOFT, 0.03, "blood"),
    "myocardium": Tissue(17, _SOFT, 0.10, "myocardium"),
    "mediastinum": Tissue(18, 0.0094, 0.10, "mediastinum"),
    "oesophagus": Tissue(19, _SOFT, 0.10, "oesophagus"),
    "liver": Tissue(20, 0.00977, 0.05, "liver"),
    "spleen": Tissue(21, _SOFT, 0.06, "spleen"),
    "kidney": Tissue(22, _SOFT, 0.08, "kidney"),
    "urine": Tissue(23, 0.0096, 0.0, "urine"),
    "stomach": Tissue(24, _SOFT, 0.10, "stomach"),
    "lumen": Tissue(25, 0.0092, 0.05, "lumen"),
    "bowel": Tissue(26, _SOFT, 0.15, "bowel"),
    "duodenum": Tissue(27, _SOFT, 0.12, "duodenum"),
    "pancreas": Tissue(28, _SOFT, 0.10, "pancreas"),
    "adrenal": Tissue(29, _SOFT, 0.05, "adrenal"),
    "gallbladder": Tissue(30, 0.0096, 0.0, "gallbladder"),
    "prostate": Tissue(31, _SOFT, 0.10, "prostate"),
    "uterus": Tissue(32, _SOFT, 0.10, "uterus"),
    "rectum": Tissue(33, _SOFT, 0.10, "rectum"),
    "breast": Tissue(34, 0.0094, 0.15, "breast"),
    "gas": Tissue(36, 1e-5, 0.0, ""),
    "lesion_hot": Tissue(40, _SOFT, 0.15, ""),
    "lesion_cold": Tissue(41, _SOFT, 0.05, ""),
}
LABELS: dict[str, int] = {name: tissue.label for name, tissue in TISSUES.items()}
"""Name of a tissue -> its integer in label rasters."""
