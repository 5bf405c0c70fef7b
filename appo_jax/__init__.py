"""APPO (Agentic Procedural Policy Optimization, arXiv 2606.12384) in JAX."""
