"""Every rule that `branching.score` can name: one module each, with a `RULE`, found by its file name.

To add one, write a module here and add its name to the field's choices in `config/method.py`.
"""

import importlib
import pkgutil

from appo_jax.branching.rule import Rule
from appo_jax.errors import ConfigError


def _rule(name: str) -> Rule:
    module = importlib.import_module(f"{__name__}.{name}")
    if not hasattr(module, "RULE"):
        raise ConfigError(f"{module.__file__}: expected `RULE = ByScore(…)` or `RULE = ByTurns(…)`, found no `RULE`")
    return module.RULE


RULES: dict[str, Rule] = {module.name: _rule(module.name) for module in pkgutil.iter_modules(__path__)}
