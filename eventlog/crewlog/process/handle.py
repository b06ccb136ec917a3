"""Hold one process: send it signals, wait for its end, learn how it ended, and mistake it never.

A pidfd names the process for as long as it is open, so nothing that happens between the check of
the identity and the signal can make the signal reach another process.
"""

import os
import signal
import time
from typing import Final

from crewlog import host
from crewlog.errors import ProcessNotFound
from crewlog.host import Closable
from crewlog.model.events import Identity, Status
from crewlog.process import identity
from crewlog.process.evidence import witness
from crewlog.process.liveness import judge

# How long after its end a process that is not our child is given to be reaped.
REAP_WAIT_S: Final = 0.5
REAP_LOOK_S: Final = 0.01


class Process(Closable):
    """The process of an identity, held by its pidfd; `close` lets go of it."""

    def __init__(self, who: Identity) -> None:
        """Open it, and check that it is the one.

        Raises: ProcessNotFound if it is not there.
        """
        self.who = who
        opened, self._fd = identity.open_pidfd(who.pid)
        self._file = host.NO_FILE if self._fd < 0 else host.own(self._fd)
        try:
            if opened in {"no_such_process", "thread"} or not self._is_same():
                raise ProcessNotFound(who.pid)
        except BaseException:
            self.close()
            raise

    def _is_same(self) -> bool:
        if self._fd >= 0 and self.who.pidfd_id is not None and identity.pidfds_have_inodes():
            return os.fstat(self._fd).st_ino == self.who.pidfd_id
        try:
            now = identity.capture(self.who.pid)
        except ProcessNotFound:
            return False
        return now.start_ticks is not None and now.start_ticks == self.who.start_ticks

    def send(self, number: int) -> bool:
        """Send a signal; False if the process has ended.

        Raises: PermissionError.
        """
        try:
            if self._fd >= 0:
                signal.pidfd_send_signal(self._fd, number)
            else:  # no pidfd on this system: the check of a moment ago must do
                os.kill(self.who.pid, number)
        except ProcessLookupError:
            return False
        return True

    @property
    def fd(self) -> int:
        """Return the pidfd, -1 where there is none."""
        return self._fd

    def wait(self, wait_s: float) -> bool:
        """Wait until it has ended; False after `wait_s` seconds."""
        if self._fd >= 0 and not host.is_still(self._fd, self._file):
            self._fd = -1  # the host has closed it: judged without
        if self._fd >= 0:
            return identity.ended(self._fd, wait_s=wait_s)
        deadline = time.monotonic() + wait_s
        while not self._has_ended():
            if time.monotonic() > deadline:
                return False
            time.sleep(REAP_LOOK_S)
        return True

    def _has_ended(self) -> bool:
        """Judge as everybody does, by the table: a zombie has ended, with a pidfd and without."""
        answer = identity.look_once(self.who)
        if answer is not None:
            return answer
        seen = witness().look(self.who, last_event_at=host.now())
        return judge(self.who, seen, final=False).dead

    def spare(self) -> None:
        """Close the descriptor, and judge without it from here on."""
        self.close()

    def status(self) -> Status | None:
        """Return how it ended; None if nobody tells. Its parent is given a moment to reap it."""
        if self._fd < 0:
            return None
        deadline = time.monotonic() + REAP_WAIT_S
        while True:
            status = identity.exit_status(self.who.pid, self._fd)
            if status is not None or time.monotonic() > deadline:
                return status
            time.sleep(REAP_LOOK_S)

    def close(self) -> None:
        """Let go of it; idempotent."""
        if self._fd >= 0:
            host.close_own(self._fd, self._file)
            self._fd = -1
