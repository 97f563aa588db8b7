"""Notes where every packet goes that leaves this network namespace: `python sniffer.py OUT`.

OUT gets a line for each kind that was seen, when first seen: `arp`, `icmpv6`, or
`PROTOCOL ADDRESS:PORT`. It says `ready` before anything else. Runs until it is ended.
"""

import ipaddress
import socket
import sys
from pathlib import Path

ETH_P_ALL = 3
OUTGOING = 4
HOP_BY_HOP, ICMPV6 = 0, 58
PORTS = {6: "tcp", 17: "udp"}


def kind(protocol: int, packet: bytes) -> str:
    """Say where a packet goes, from its Ethernet type and what follows the Ethernet header."""
    match protocol:
        case 0x0806:
            return "arp"
        case 0x86DD:
            following = packet[6]
            if following == HOP_BY_HOP:
                following = packet[40]
            if following == ICMPV6:
                return "icmpv6"
            return f"ipv6-{following} {ipaddress.IPv6Address(packet[24:40])}"
        case 0x0800:
            address = ipaddress.IPv4Address(packet[16:20])
            if name := PORTS.get(packet[9]):
                start = 4 * (packet[0] & 15)
                return f"{name} {address}:{int.from_bytes(packet[start + 2 : start + 4], 'big')}"
            return f"ip-{packet[9]} {address}"
    return f"type {protocol:#06x}"


def main(out: Path) -> None:
    """Look at every packet on every interface but the loopback."""
    seen = set()
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL)) as raw,
        out.open("w") as log,
    ):
        print("ready", file=log, flush=True)
        while True:
            packet, (interface, protocol, direction, *_) = raw.recvfrom(1 << 16)
            if interface == "lo" or direction != OUTGOING:
                continue
            found = kind(protocol, packet)
            if found not in seen:
                seen.add(found)
                print(found, file=log, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
