"""The vault's gRPC service: the contract, the code made from it, and messages in chunks."""

import os

# gRPC's core writes to stderr past the logging module; it reads this when it is first used.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
