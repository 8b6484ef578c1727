"""``python -m metaflow_hf.train.follower FD FACTS``: a further process of a worker with several GPUs (see ``team``)."""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection


def main() -> int:
    """Follows; what goes wrong is told to the leader, whose log is the task's."""
    # Signals that go to all processes of a task mean the leader, which finishes what it has in hand with this one.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)

    from metaflow_hf.train.team import follow

    pipe, facts = Connection(int(sys.argv[1])), json.loads(sys.argv[2])
    threading.Thread(target=_end_with, args=(int(facts["leader"]),), daemon=True).start()
    try:
        follow(facts, pipe)
    except Exception as error:
        logging.getLogger("metaflow_hf.train").exception("process %s of this worker failed", facts["rank"])
        with contextlib.suppress(OSError):
            pipe.send(f"{type(error).__name__}: {error}")
        logging.shutdown()
        # At once: what is under way on a GPU, for which an orderly end would wait, ends for nobody any more.
        os._exit(1)
    return 0


def _end_with(leader: int) -> None:
    """Ends this process when its leader was killed, wherever it waits for it."""
    while os.getppid() == leader:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
