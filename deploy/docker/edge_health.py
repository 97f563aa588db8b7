#!/usr/bin/env python3
"""Exit with 0 if the edge of the coordinator's folder DIR answers over TLS: `edge_health.py DIR`.

The certificate is checked against the folder's own CA, so a proxy or a stranger on the port is no
healthy edge.
"""

import http.client
import ssl
import sys
from pathlib import Path

import yaml

PATH = "/veilgraft/health"
SECONDS = 5.0


def main() -> int:
    """Ask once; say on stderr what is wrong."""
    folder = Path(sys.argv[1])
    port = yaml.safe_load((folder / "coordinator.yaml").read_text(encoding="utf-8"))["port"]
    context = ssl.create_default_context(cafile=folder / "tls" / "ca.pem")
    # The certificate is good for loopback too.
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=SECONDS, context=context)
    try:
        connection.request("GET", PATH)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"edge: {type(error).__name__}", file=sys.stderr)  # noqa: T201
        return 1
    finally:
        connection.close()
    if status != http.client.OK:
        print(f"edge: expected 200 for {PATH}, got {status}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
