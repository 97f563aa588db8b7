"""The edge's own calls to SuperLink, which listens on loopback."""

import ssl
from collections.abc import Mapping
from pathlib import Path

import httpx
from flwr.proto import control_pb2
from flwr.supercore.constant import NodeStatus

from veilgraft.errors import InputError, VeilgraftError

TIMEOUT_SECONDS = 25.0
"""Less than a SuperNode waits, so that it gets the edge's 504 and asks again."""

MEDIA_TYPE = "application/protobuf"
_HEADERS = {"content-type": MEDIA_TYPE, "accept": MEDIA_TYPE}


class UnavailableError(VeilgraftError):
    """SuperLink can't be reached, or says that it can't answer now."""


class SuperLink:
    """Calls over TLS to one address, such as `127.0.0.1:9092`.

    Args:
        ca: PEM file of the authority that signed SuperLink's certificate.
        seconds: how long an answer may take.

    Raises:
        InputError: the file can't be used.
    """

    def __init__(self, address: str, ca: Path, seconds: float = TIMEOUT_SECONDS) -> None:
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise InputError(f"{ca}: can't be read as a certificate: {error.strerror}") from None
        self._client = httpx.AsyncClient(
            base_url=f"https://{address}",
            verify=context,
            timeout=seconds,
            trust_env=False,
            # SuperLink closes idle connections after 5 s; one that is used just then fails.
            limits=httpx.Limits(keepalive_expiry=2.0),
        )

    async def close(self) -> None:
        """End all connections."""
        await self._client.aclose()

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """Return SuperLink's answer, whatever its status; raises `httpx.HTTPError`."""
        sent = {**_HEADERS, **(headers or {})}
        return await self._client.post(path, content=body, headers=sent)

    async def register(self, node: bytes, name: str) -> int | None:
        """Make a node's PEM key known, and return what SuperLink calls it.

        A key that is known already keeps its name. None: SuperLink does not want the key.

        Raises:
            UnavailableError: no answer; the key may be known or not.
        """
        request = control_pb2.RegisterNodeRequest(public_key=node, name=name)
        answer = await self._control("register-node", request.SerializeToString())
        if answer.status_code == httpx.codes.PRECONDITION_FAILED:
            return await self._known(node)
        if answer.status_code != httpx.codes.OK:
            return None
        return control_pb2.RegisterNodeResponse.FromString(answer.content).node_id or None

    async def _known(self, node: bytes) -> int | None:
        request = control_pb2.ListNodesRequest().SerializeToString()
        answer = await self._control("list-nodes", request)
        if answer.status_code != httpx.codes.OK:
            return None
        listed = control_pb2.ListNodesResponse.FromString(answer.content).nodes_info
        known = (info for info in listed if info.status != NodeStatus.UNREGISTERED)
        return next((info.node_id for info in known if info.public_key == node), None)

    async def _control(self, call: str, body: bytes) -> httpx.Response:
        try:
            answer = await self.post(f"/v1/control/{call}", body)
        except httpx.HTTPError as error:
            raise UnavailableError(f"SuperLink: {type(error).__name__}") from None
        if answer.is_server_error:
            raise UnavailableError(f"SuperLink: {answer.status_code}")
        return answer
