"""Makes network namespaces, joined by cables to a switch: `python cable.py SUBNET SWITCH NAME…`.

The n-th gets the address SUBNET.n, and the switch's port n - 1. A program of its own, as pyroute2
forks, and leaves sockets to the collector.
"""

import sys
from collections.abc import Sequence

from pyroute2 import NetNS, netns


def cable(subnet: str, switch: str, names: Sequence[str]) -> None:
    """Make the namespaces, and a bridge in `switch`."""
    for name in (switch, *names):
        netns.create(name)
    with NetNS(switch) as middle:
        middle.link("add", ifname="switch", kind="bridge")
        bridge = middle.link_lookup(ifname="switch")[0]
        middle.link("set", index=bridge, state="up")
        for number, name in enumerate(names):
            far = {"ifname": "eth0", "net_ns_fd": name}
            middle.link("add", ifname=f"port{number}", kind="veth", peer=far)
            port = middle.link_lookup(ifname=f"port{number}")[0]
            middle.link("set", index=port, master=bridge, state="up")
    for number, name in enumerate(names, start=1):
        with NetNS(name) as host:
            eth0, lo = (host.link_lookup(ifname=each)[0] for each in ("eth0", "lo"))
            host.addr("add", index=eth0, address=f"{subnet}.{number}", prefixlen=24)
            for index in (eth0, lo):
                host.link("set", index=index, state="up")


if __name__ == "__main__":
    cable(sys.argv[1], sys.argv[2], sys.argv[3:])
