"""A page for each package and module of appo_jax, made from its docstrings while the site is built (mkdocs-gen-files)."""

from pathlib import Path

import mkdocs_gen_files

nav = mkdocs_gen_files.Nav()
for path in sorted(Path("appo_jax").iterdir()):
    package, name = (path / "__init__.py").exists(), path.stem
    if (not package and path.suffix != ".py") or name.startswith("__"):
        continue
    with mkdocs_gen_files.open(f"api/{name}.md", "w") as page:
        page.write(f"::: appo_jax.{name}\n")
    nav[name] = f"{name}.md"
with mkdocs_gen_files.open("api/SUMMARY.md", "w") as summary:
    summary.writelines(nav.build_literate_nav())
