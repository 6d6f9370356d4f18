"""The arithmetic around tokens that is worth a kernel of its own, by its names; reference.py defines it."""

from repa_scale.kernels.reference import cosine_loss, normalize_tokens

__all__ = ["cosine_loss", "normalize_tokens"]
