"""The programs that run inside the Python tool's sandbox. They use only the standard library and each other.

`supervisor` never runs policy code: it decides which process may fork, and kills processes. `interpreter` runs policy code.
`appo_jax.tools.python` starts both with only this package on their path; therefore they use relative imports.
"""
