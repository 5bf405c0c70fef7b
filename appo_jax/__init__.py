"""APPO (Agentic Procedural Policy Optimization, arXiv 2606.12384) in JAX."""

__version__ = "0.1.0"
