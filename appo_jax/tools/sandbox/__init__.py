"""The programs that run inside the Python tool's sandbox: standard library only, nothing of the rest of the package.

`supervisor` never runs policy code; it decides what may fork and kills what must end. `interpreter` runs policy code.
Both are started by `appo_jax.tools.python` with this package alone on their path, hence the relative imports.
"""
