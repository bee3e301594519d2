"""Kill -9 a worker of Ray's while it works."""

import os
import signal
import threading
import time
from collections.abc import Callable


def killing(worker: str, begun: Callable[[], bool]) -> list[int]:
    """Kills the first process of the class ``worker`` below this one as soon as ``begun``; the list then has its id."""
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            time.sleep(0.002)
            if begun():
                for entry in os.listdir("/proc"):
                    if entry.isdecimal() and _is_worker(int(entry), worker):
                        os.kill(int(entry), signal.SIGKILL)
                        killed.append(int(entry))
                        return

    threading.Thread(target=kill, daemon=True).start()
    return killed


def _is_worker(pid: int, worker: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            name = file.read()
        parent = pid
        while parent > 1 and parent != os.getpid():
            with open(f"/proc/{parent}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError):
        return False
    return parent == os.getpid() and name.startswith(f"ray::{worker}")
