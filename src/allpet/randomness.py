"""Keyed random generators: a draw depends on what it is for, not on who makes it.

Training draws are keyed by (seed, epoch, sample id, purpose) and sampling draws by the sample's index. Rank, worker,
batch and the number of draws made before do not matter, so a resumed run draws what the uninterrupted one would have.
"""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a key, for example ``(seed, epoch, sample_id, "mask")``.

    Args:
        key: whole numbers and words; equal keys give equal generators, all others independent ones.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
