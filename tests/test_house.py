"""Bounds on the size of modules, functions and signatures, so that each is easy to read; declared dependencies; and names that
stand in two places."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import get_args

from appo_jax.branching.rule import ByScore, ByTurns
from appo_jax.branching.rules import RULES
from appo_jax.config.method import Score, TurnRule

PACKAGE = Path(__file__).parents[1] / "appo_jax"
MODULE_LINES, FUNCTION_LINES, PARAMETERS = 350, 60, 7
LONG_MODULES = {"tools/sandbox/supervisor.py"}  # one state machine, which is easier to check on one page


def modules() -> Iterator[tuple[str, str]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield str(file.relative_to(PACKAGE)), file.read_text()


def functions(text: str) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))


def public(text: str) -> Iterator[ast.FunctionDef]:
    """Functions of a module and methods of its classes that others may call."""
    tree = ast.parse(text)
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
    for body in bodies:
        yield from (node for node in body if isinstance(node, ast.FunctionDef) and node.name[0] != "_")


def test_no_module_is_too_long():
    long = {name: n for name, text in modules() if (n := text.count("\n")) > MODULE_LINES and name not in LONG_MODULES}
    assert not long


def test_no_function_is_too_long():
    long = {
        f"{name}:{f.name}": n
        for name, text in modules()
        for f in functions(text)
        if (n := f.end_lineno - f.lineno + 1) > FUNCTION_LINES
    }
    assert not long


def test_no_public_function_has_too_many_parameters():
    many = {}
    for name, text in modules():
        for f in public(text):
            arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
            if (n := len([a for a in arguments if a.arg not in ("self", "cls")])) > PARAMETERS:
                many[f"{name}:{f.name}"] = n
    assert not many


def test_every_imported_package_is_declared():
    """One that comes only with another package is gone when that one no longer needs it."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = {
        re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", need)[0]).lower()
        for need in [*project["dependencies"], *project["optional-dependencies"]["smollm2"]]
    }
    imported = set()
    for _, text in modules():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    of = packages_distributions()
    undeclared = {
        name
        for name in imported - sys.stdlib_module_names - {"appo_jax"}
        if not declared & {re.sub(r"[-_.]+", "-", package).lower() for package in of.get(name, ())}
    }
    assert not undeclared


def test_the_choices_of_the_branching_score_are_the_files_of_the_rules():
    """Else the only error for a rule that is missing in the config is a list of the others."""
    for kind, choices, list_of_names in ((ByScore, Score, "Score"), (ByTurns, TurnRule, "TurnRule")):
        names, files = set(get_args(choices)), {name for name, rule in RULES.items() if isinstance(rule, kind)}
        assert files <= names, (
            f"add {sorted(files - names)} of appo_jax/branching/rules/ to {list_of_names} in appo_jax/config/method.py, and say in "
            "the docstring of `score` there what it does"
        )
        assert names <= files, (
            f"{list_of_names} in appo_jax/config/method.py has {sorted(names - files)}: write a file of this name in "
            f"appo_jax/branching/rules/ that ends in RULE = {kind.__name__}(…), or take the name out"
        )
