"""Importing a module of ours touches no device: hosts join each other first, and a command reports its errors at once."""

import subprocess
import sys

MODULES = """
import importlib, pkgutil, sys
import appo_jax
import jax._src.xla_bridge as bridge
for module in pkgutil.walk_packages(appo_jax.__path__, "appo_jax."):
    importlib.import_module(module.name)
    print(module.name)
    if bridge.backends_are_initialized():
        sys.exit(f"importing {module.name} initialises a backend of JAX")
"""


def test_no_module_of_ours_touches_a_device_when_it_is_imported():
    done = subprocess.run([sys.executable, "-c", MODULES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"appo_jax.train", "appo_jax.tools.search", "appo_jax.components"} <= set(done.stdout.split())
