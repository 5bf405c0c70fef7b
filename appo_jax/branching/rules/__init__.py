"""Every rule that `branching.score` can name: one module each, with a `RULE`, found by its file name.

To add one, write a module here and add its name to the field's choices in `config/method.py`.
"""

import importlib
import pkgutil

from appo_jax.branching.rule import Rule

RULES: dict[str, Rule] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").RULE for module in pkgutil.iter_modules(__path__)
}
