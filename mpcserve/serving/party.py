"""A server process, from start to end, in the role it is given."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping

from mpcserve.config import Config
from mpcserve.protocol import warm_up
from mpcserve.serving.alice import Alice
from mpcserve.serving.bob import Bob
from mpcserve.serving.carol import Carol
from mpcserve.serving.heap import share_one_heap
from mpcserve.serving.links import Wiring
from mpcserve.serving.log import log, start_log
from mpcserve.serving.server import Server
from mpcserve.transport import NetworkProfile

SERVERS: Mapping[str, type[Server]] = {"alice": Alice, "bob": Bob, "carol": Carol}

WAKE_S = 0.5
"""A signal that comes to another thread may leave the main thread asleep: it looks by itself."""


def run_party(
    config: Config,
    role: str,
    *,
    stop: threading.Event,
    on_ready: Callable[[], None],
    plaintext: bool = False,
    network: str = "loopback",
) -> None:
    """Serve until `stop` is set; then take no more requests, finish what runs, and return.

    `on_ready` is called when kernels are compiled and peers connected. Raises: ConfigError.
    """
    share_one_heap()
    start_log(role, config.log_level)
    warm_up()
    gc.freeze()  # a hundred thousand objects of the imports stay: do not search them for garbage
    wiring = Wiring(config, role, NetworkProfile.parse(network), plaintext)
    server = SERVERS[role](wiring)
    try:
        server.start()
        if server.links.wait_up(stop):
            on_ready()
            log.info("ready, %d models deployed", len(server.store))
            while not stop.wait(WAKE_S):
                pass
            if not server.drain(config.deadlines.drain):
                log.warning("requests still run after %g s: leaving them", config.deadlines.drain)
    finally:
        server.close()
    log.info("stopped")
