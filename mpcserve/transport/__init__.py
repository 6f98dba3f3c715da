"""Transport: authenticated links of many streams, over TLS or in memory, with deadlines.

connect, Listener, MemoryNetwork     make links                          endpoints.py
Link                                 one connection: reader, streams     link.py, streams.py
Channel                              one stream: send, receive           channel.py
                                     queues, turns, the writer thread    sender.py
                                     who reads the socket, and when      reading.py
NetworkProfile                       emulated delay and bandwidth        network.py
TlsFiles                             mutual TLS 1.3, roles, its errors   tls.py
LinkOptions, Hooks, Counters         limits, callbacks, what was sent    options.py
"""

from mpcserve.transport.channel import Channel
from mpcserve.transport.endpoints import Listener, MemoryNetwork, OnLink, OnStream, connect
from mpcserve.transport.link import Link
from mpcserve.transport.network import LAN, LOOPBACK, WAN, NetworkProfile
from mpcserve.transport.options import Counters, Hooks, LinkOptions
from mpcserve.transport.tls import ROLE_URI, TlsFiles

__all__ = [
    "LAN",
    "LOOPBACK",
    "ROLE_URI",
    "WAN",
    "Channel",
    "Counters",
    "Hooks",
    "Link",
    "LinkOptions",
    "Listener",
    "MemoryNetwork",
    "NetworkProfile",
    "OnLink",
    "OnStream",
    "TlsFiles",
    "connect",
]
