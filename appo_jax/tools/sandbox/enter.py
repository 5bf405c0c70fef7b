"""If the trainer is root, this runs before bubblewrap: it makes a user namespace in which policy code is the user nobody.

bubblewrap by itself would map the sandbox's user to the user who starts it, and root owns the host's files and devices. So two
users are mapped here: root (0), which bubblewrap needs to read its files, and an unprivileged user. The supervisor becomes the
unprivileged user before it does anything else.
"""

from __future__ import annotations

import os

from . import system

UNPRIVILEGED = 65534  # the user on the host that policy code becomes when the trainer is root: nobody
INSIDE = 1000  # the same user, as seen in the sandbox


def main(command: list[str]) -> None:
    """Enter the namespace and become `command` (bubblewrap's). Raises OSError."""
    me, (wait, go) = os.getpid(), os.pipe()
    mapper = os.fork()
    if mapper == 0:  # only a process outside the namespace may map other users than its own
        os.close(go)
        os.read(wait, 1)
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{me}/{name}", "w") as file:
                file.write(f"0 0 1\n{INSIDE} {UNPRIVILEGED} 1\n")
        os._exit(0)
    system.unshare(system.CLONE_NEWUSER)
    os.close(go)
    _, status = os.waitpid(mapper, 0)
    if status != 0:
        raise OSError(f"the user {UNPRIVILEGED} cannot be mapped into a user namespace here")
    os.close(wait)
    os.execv(command[0], command)


def become_unprivileged() -> None:
    """Change from the sandbox's root to the unprivileged user."""
    os.setgroups([])
    os.setresgid(INSIDE, INSIDE, INSIDE)
    os.setresuid(INSIDE, INSIDE, INSIDE)
    system.prctl(system.PR_SET_DUMPABLE, 1)  # so that the process owns its /proc entries again
