"""repa_scale trains REPA diffusion transformers on clusters. Importing it is quick and needs nothing but torch."""

__version__ = "0.1.0"
