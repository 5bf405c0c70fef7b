"""The machine's checks say what they found, and agree with what the tool does."""

from appo_jax.config import PythonToolConfig
from appo_jax.errors import ToolError
from appo_jax.tools.doctor import probe
from appo_jax.tools.python import PythonTool


def test_the_checks_agree_with_the_tool():
    checks = {check.name: check for check in probe()}
    assert all(check.detail for check in checks.values())
    for isolation in ("bubblewrap", "process"):
        try:
            PythonTool(PythonToolConfig(isolation=isolation, preload=("math",))).close()
            works = True
        except ToolError:
            works = False
        assert checks[f"python tool, isolation {isolation}"].ok is works


def test_a_machine_without_bubblewrap(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = {check.name: check for check in probe()}
    for name in ("bubblewrap", "user namespaces", "python tool, isolation bubblewrap"):
        assert not checks[name].ok
    assert "apt-get install bubblewrap" in checks["bubblewrap"].detail
