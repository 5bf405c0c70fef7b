"""The command that starts the sandbox's first process: the parts of this machine that it sees, and the user it runs as."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from appo_jax.config import PythonToolConfig
from appo_jax.errors import ToolError
from appo_jax.tools.sandbox.system import DEVICES

SANDBOX = Path(__file__).resolve().parent / "sandbox"  # the programs that run inside
SITE = "/sandbox/site"  # folder of the allowed modules inside the sandbox
# The paths of the system that Python and its shared libraries need. They hold no programs, which policy code could not start.
SYSTEM = (
    "/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives",
    "/usr/share/zoneinfo",
)  # fmt: skip

MEMORY_TOTAL = 0  # bytes for all states; 0: half of what is free


def command_line(config: PythonToolConfig, control: int, folder: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of the sandbox's first process. `control` is its socket to the trainer.

    Raises ToolError for a module that is not installed, FileNotFoundError without bubblewrap."""
    isolated = config.isolation == "bubblewrap"
    home = "/tmp" if isolated else folder
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg",
    }  # fmt: skip
    options = {
        "isolation": config.isolation, "preload": config.preload, "memory_mb": config.memory_mb,
        "max_output_bytes": config.max_output_bytes, "folder": folder, "memory_total": MEMORY_TOTAL,
    }  # fmt: skip
    modules = {} if not isolated else locate([*config.preload, *config.modules])
    sites = [SITE] if isolated else _site_folders()
    programs = "/sandbox" if isolated else str(SANDBOX.parent)
    # The path entry of the programs is removed again, so that policy code does not import the tools by accident.
    start = (
        f"import sys; sys.path += {sites!r}; sys.path.append({programs!r}); "
        f"from sandbox import supervisor; sys.path.pop(); supervisor.main({control}, {options!r})"
    )
    python = [os.path.realpath(sys.executable), "-s", "-S", "-P", "-B", "-c", start]
    if not isolated:
        return python, environment
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise FileNotFoundError("bwrap is not installed")
    root = os.geteuid() == 0
    command = [bwrap, *_namespaces(root), *_mounts(modules)]
    for name, value in environment.items():
        command += ["--setenv", name, value]
    command += ["--chdir", "/", "--", *python]
    if root:
        enter = (
            f"import sys; sys.path.append({str(SANDBOX.parent)!r}); from sandbox import enter; enter.main(sys.argv[1:])"
        )
        command = [sys.executable, "-s", "-S", "-P", "-B", "-c", enter, *command]
    return command, {}


def _namespaces(root: bool) -> list[str]:
    options = [
        "--die-with-parent", "--unshare-pid", "--as-pid-1", "--unshare-net", "--unshare-ipc", "--unshare-uts",
        "--unshare-cgroup-try", "--hostname", "sandbox", "--clearenv",
    ]  # fmt: skip
    if root:  # in the namespace of `enter`; the supervisor becomes its unprivileged user
        return [*options, "--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return [*options, "--unshare-user", "--uid", "1000", "--gid", "1000"]


def _mounts(modules: dict[str, Path]) -> list[str]:
    """Everything read-only: the system's libraries, Python and its standard library, the modules, four devices."""
    options = _folders("/usr", "/usr/share", "/etc", "/sandbox", SITE)
    for path in SYSTEM:  # only a few mounts, because every call's namespace copies all of them
        if os.path.islink(path) and not path.startswith("/etc/"):
            options += ["--symlink", os.readlink(path), path]
        else:
            options += ["--ro-bind-try", path, path]
    executable = os.path.realpath(sys.executable)
    library = str(Path(sysconfig.get_config_var("prefix")).resolve() / "lib")
    for path in dict.fromkeys((library, str(Path(sysconfig.get_path("stdlib")).resolve()), executable)):
        if path != library and path.startswith(library + "/"):
            continue
        above = [folder for folder in Path(path).parents if not any(folder.is_relative_to(place) for place in SYSTEM)]
        options += _folders(*map(str, reversed(above)))
        options += ["--ro-bind", path, path]
    for path in _foreign_modules([*SYSTEM, library]):
        options += ["--tmpfs", path, "--remount-ro", path]
    for name, source in modules.items():
        options += ["--ro-bind", str(source), f"{SITE}/{name}"]
    options += ["--ro-bind", str(SANDBOX), "/sandbox/sandbox", "--proc", "/proc", *_folders("/tmp", "/dev")]
    for device in DEVICES:
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    return [*options, "--remount-ro", "/"]


def _folders(*paths: str) -> list[str]:
    """The parent folders of the mounts, readable by policy code; bubblewrap would make them readable only by the user
    who starts it."""
    return [word for path in paths if path != "/" for word in ("--perms", "0755", "--dir", path)]


def _site_folders() -> list[str]:
    return list(dict.fromkeys(str(Path(path).resolve()) for path in sys.path if path.endswith("-packages")))


def _foreign_modules(roots: Iterable[str]) -> list[str]:
    """The folders of installed packages below the mounted paths. They are hidden, so that only allowed modules are seen."""
    folders = set(_site_folders())
    for root in ("/usr/lib", "/usr/local/lib", str(Path(sysconfig.get_config_var("prefix")).resolve() / "lib")):
        folders |= {str(path.resolve()) for path in Path(root).glob("python3*/*-packages")}
    inside = [str(Path(root).resolve()) for root in roots]
    return sorted(f for f in folders if os.path.isdir(f) and any(f.startswith(root + "/") for root in inside))


def locate(names: Iterable[str]) -> dict[str, Path]:
    """The files and folders of modules and of their requirements, by their name in the folder of packages.

    Modules of the standard library are skipped. Raises ToolError for a module that is not installed."""
    found: dict[str, Path] = {}
    owners = {top: {*map(_normal, names)} for top, names in importlib.metadata.packages_distributions().items()}
    seen: set[str] = set()

    def add_distribution(name: str) -> None:
        if name in seen:
            return
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            return  # an optional requirement, or one for another platform
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in found and not top.startswith(("..", "__")) and not top.endswith((".dist-info", ".pth")):
                found[top] = Path(str(distribution.locate_file(top))).resolve()
        for top in [top for top, names in owners.items() if name in names and top.isidentifier()]:
            if not any(
                file.partition(".")[0] == top for file in found
            ):  # installed in editable mode: its files are elsewhere
                found.update(_imported_from(top))
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                match = re.match(r"[A-Za-z0-9._-]+", requirement)
                if match:
                    add_distribution(_normal(match[0]))

    for name in names:
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names:
            continue
        for distribution in owners.get(top, ()):
            add_distribution(distribution)
        if top not in owners:
            files = _imported_from(top)
            if not files:
                raise ToolError(
                    f"tools.python.preload, tools.python.modules: the module {top!r} is not installed here; install it, or "
                    "leave it out"
                )
            found.update(files)
    return {name: path for name, path in found.items() if path.exists()}


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _imported_from(top: str) -> dict[str, Path]:
    """The folder or file from which Python imports a module, by its name in the folder of packages; empty if there is none."""
    spec = importlib.util.find_spec(top)
    if spec is None:
        return {}
    if spec.submodule_search_locations:
        return {top: Path(next(iter(spec.submodule_search_locations))).resolve()}
    origin = Path(spec.origin or "").resolve()
    return {origin.name: origin} if spec.has_location else {}


def advice(config: PythonToolConfig, reason: str) -> str:
    """The error message for a sandbox that does not start: the reason, and what to do."""
    if config.isolation == "process":
        return f"tools.python: the interpreter does not start ({reason})"
    return (
        f"tools.python.isolation = bubblewrap: the sandbox does not start ({reason.strip()}). Install it (apt-get "
        "install bubblewrap), allow unprivileged user namespaces (on Ubuntu 23.10 and later: sysctl -w "
        "kernel.apparmor_restrict_unprivileged_userns=0), and see `appo-jax doctor`. Only for policies you trust: "
        "--tools.python.isolation process"
    )
