"""A state's files: a fork has all files of its parent, including open ones; otherwise the policy gets the reason."""

import pytest
from test_python import BUBBLEWRAP, ISOLATIONS, run

from appo_jax.config import PythonToolConfig
from appo_jax.tools.python import PythonTool
from appo_jax.types import Outcome


@pytest.fixture(scope="module", params=ISOLATIONS)
def tool(request):
    tool = PythonTool(PythonToolConfig(isolation=request.param, preload=("math",)))
    yield tool
    tool.close()


# Cells, and what the second must show: what it shows in an interpreter that is never forked.
KEPT_FILES = {
    "nameless": (
        ("import tempfile\nf = tempfile.TemporaryFile('w+')\n_ = f.write('abc'); f.flush()"),
        "_ = f.seek(0); f.read()",
        "'abc'",
    ),
    "removed": (
        ("import os\nf = open('f', 'w+'); _ = f.write('abc'); f.flush(); os.remove('f')"),
        "_ = f.seek(1); f.read()",
        "'bc'",
    ),
    "position": ("f = open('f', 'w+'); _ = f.write('abcdef'); _ = f.seek(2)", "f.read()", "'cdef'"),
    "append": (
        "f = open('f', 'a'); _ = f.write('a'); f.flush()",
        "_ = f.write('b'); f.flush(); open('f').read()",
        "'ab'",
    ),
    "read_only": (
        "open('f', 'w').write('abc'); f = open('f'); _ = f.read(1)",
        "f.read(1), f.writable()",
        "('b', False)",
    ),
    "duplicate": (
        ("import os\nopen('f', 'w').write('abcdef')\na = os.open('f', os.O_RDWR); b = os.dup(a)"),
        "os.read(a, 2), os.read(b, 2)",
        "(b'ab', b'cd')",
    ),
    "two_opens": (
        ("import os\nopen('f', 'w').write('abcdef')\na, b = os.open('f', os.O_RDWR), os.open('f', os.O_RDWR)"),
        "os.read(a, 2), os.read(b, 2)",
        "(b'ab', b'ab')",
    ),
    "hard_link": (
        ("import os\nopen('f', 'w').write('a'); os.link('f', 'g')"),
        "open('f', 'a').write('b'); os.stat('g').st_nlink, open('g').read()",
        "(2, 'ab')",
    ),
    "large_hard_link": (
        ("import os\nopen('f', 'wb').write(bytes(10 << 20)); os.link('f', 'g')"),
        "os.stat('g').st_size >> 20",
        "10",
    ),
    "sparse": (
        ("for i in range(8):\n    with open(str(i), 'wb') as f: f.truncate(15 << 20)"),
        ("import os\nos.stat('7').st_size >> 20, os.stat('7').st_blocks"),
        "(15, 0)",
    ),
    "times": (
        ("import os\nopen('f', 'w').close(); os.utime('f', (5, 6)); os.mkdir('d'); os.utime('d', (7, 8))"),
        "os.stat('f').st_mtime, os.stat('d').st_mtime",
        "(6.0, 8.0)",
    ),
    "modes": (
        ("import os\nopen('f', 'w').close(); os.chmod('f', 0o741); os.mkdir('d', 0o750)"),
        "oct(os.stat('f').st_mode), oct(os.stat('d').st_mode)",
        "('0o100741', '0o40750')",
    ),
    "folder_open": (
        ("import os\nopen('f', 'w').close(); d = os.open('.', os.O_RDONLY)"),
        "os.listdir(d), os.stat('f', dir_fd=d).st_size",
        "(['f'], 0)",
    ),
    "symlink": (("import os\nos.symlink('nowhere', 'l')"), "os.readlink('l')", "'nowhere'"),
    "sqlite": (
        (
            "import sqlite3\n"
            "c = sqlite3.connect('d.sqlite'); c.execute('create table t (a)'); "
            "c.execute('insert into t values (1)'); c.commit()"
        ),
        (
            "_ = c.execute('insert into t values (2)'); c.commit(); "
            "sqlite3.connect('d.sqlite').execute('select sum(a) from t').fetchall()"
        ),
        "[(3,)]",
    ),
    "removed_working_directory": (
        ("import os\nos.mkdir('d'); os.chdir('d'); os.rmdir('../d')"),
        ("try: os.getcwd()\nexcept FileNotFoundError: print('gone')"),
        "gone",
    ),
    "working_directory_elsewhere": (("import os\nos.chdir('/usr/lib')"), "os.getcwd()", "'/usr/lib'"),
    "deep_folders": (
        ("import os\nfor _ in range(200):\n    os.mkdir('d'); os.chdir('d')"),
        "os.getcwd().count('/d')",
        "200",
    ),
}


@pytest.mark.parametrize("name", KEPT_FILES)
def test_files_are_forked_as_they_are(tool, name):
    """Two branches: the second must find the same files as the first."""
    before, after, shown = KEPT_FILES[name]
    result, state = run(tool, before)
    assert result.outcome is Outcome.OK, result.text
    for _ in range(2):
        assert tool.call(state, after)[0].text == shown


REFUSED_FILES = {
    "many_open": ("f = [open('/dev/null') for _ in range(57)]", "57 files are open; close some"),
    "listing": (("import os\nopen('f', 'w').close(); s = os.scandir('.'); next(s)"), "is being listed"),
    "unreadable": (("import os\nopen('f', 'w').close(); os.chmod('f', 0)"), "'f' may not be read (mode 0000)"),
    "unreadable_folder": (("import os\nos.mkdir('d'); os.chmod('d', 0o300)"), "'d' may not be read (mode 0300)"),
    "too_deep": (("import os\nfor _ in range(2500):\n    os.mkdir('d'); os.chdir('d')"), "nested too deeply"),
    "write_only": (("import os\nf = os.open('f', os.O_CREAT | os.O_WRONLY); os.remove('f')"), "open for writing only"),
}


@pytest.mark.skipif(not BUBBLEWRAP, reason="bubblewrap does not work here")
@pytest.mark.parametrize("name", REFUSED_FILES)
def test_what_cannot_be_forked_is_refused_with_a_way_on(name):
    code, reason = REFUSED_FILES[name]
    tool = PythonTool(PythonToolConfig(preload=("math",)))
    try:
        _, state = run(tool, "x = 1")
        result, after = tool.call(state, f"x = 2\n{code}")
        assert result.outcome is Outcome.ERROR
        assert reason in result.text
        assert result.text.endswith("Variables are as they were before this call.")
        assert tool.call(after, "x")[0].text == "1"
    finally:
        tool.close()
