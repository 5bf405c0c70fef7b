"""What a process tells its supervisor about its state."""

from __future__ import annotations

import json
import socket
import time

from appo_jax import heartbeat


def test_a_heartbeat_that_waits_for_its_turn_is_not_out_of_date() -> None:
    """Two threads send them. One that was made before, and sent after, the one that said that the run can be stopped took this
    back, and a request to stop ended the run at once."""
    ours, theirs = socket.socketpair()
    with heartbeat._life.sending:  # as while another message is sent
        heartbeat.connect(theirs)
        time.sleep(0.5)
        heartbeat._life.stoppable = True
    assert json.loads(ours.makefile().readline())["stoppable"] is True
    ours.close()
