"""The committed stubs are those that the contract gives."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

COMMON = Path(__file__).parents[2] / "common"
FOLDER = Path("veilgraft/service")
STUBS = ("vault_pb2.py", "vault_pb2.pyi", "vault_pb2_grpc.py")


@pytest.mark.skipif(
    find_spec("grpc_tools") is None,
    reason="NOT CHECKED: grpcio-tools is not installed, so nobody knows if the stubs are current",
)
def test_the_stubs_are_what_the_contract_gives(tmp_path: Path) -> None:
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    contract = str(COMMON / FOLDER / "vault.proto")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{COMMON}", *out, contract]
    subprocess.run(command, check=True, timeout=60)
    for name in STUBS:
        made = (tmp_path / FOLDER / name).read_text()
        assert (COMMON / FOLDER / name).read_text() == made, f"{name} is old: run `make stubs`"


def test_the_stubs_are_imported_under_the_package_name() -> None:
    from veilgraft.service import vault_pb2, vault_pb2_grpc

    assert vault_pb2.Chunk(header=b"h").header == b"h"
    assert vault_pb2_grpc.VaultStub.__module__ == "veilgraft.service.vault_pb2_grpc"
    assert vault_pb2.DESCRIPTOR.package == "veilgraft.v1"
