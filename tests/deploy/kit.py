"""What the tests of the deploy kits share: the names that all three kits use."""

from pathlib import Path

KIT = Path(__file__).parents[2] / "deploy"
SITE = "/var/lib/veilgraft/site"
COORDINATOR = "/var/lib/veilgraft/coordinator"
DATA = "/srv/veilgraft/data"
VAULT, COURIER, EDGE, EXECUTOR = 64100, 64200, 64301, 64302
PARTS = {
    "vault": f"site vault --dir {SITE}",
    "courier": f"site courier --dir {SITE}",
    "superlink": f"coordinator superlink {COORDINATOR}",
    "executor": f"coordinator executor {COORDINATOR}",
    "conduct": f"coordinator conduct {COORDINATOR}",
    "edge": f"coordinator edge {COORDINATOR}",
    "prepare": f"coordinator prepare {COORDINATOR}",
}
COURIERS = {f"{SITE}/courier": False, f"{SITE}/courier/work": True, f"{SITE}/run": False}
"""All that a courier may see of the site's folder, and whether it may write there."""

KEYS = {f"{COORDINATOR}/signing.pem", f"{COORDINATOR}/tls/ca.key", f"{COORDINATOR}/invitations"}
"""What no part but the executor (the first), and no part at all (the others), may see."""


def sees(visible: dict[str, tuple[str, bool]], target: str) -> bool:
    """Return whether the deepest mount at or above `target` shows the folder's own."""
    above = [path for path in visible if target == path or target.startswith(f"{path}/")]
    source = visible[max(above, key=len)][0] if above else "/dev/null"
    return source not in ("/dev/null", "tmpfs")
