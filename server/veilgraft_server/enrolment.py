"""How an invited site becomes a member: a token, and a proof of each of its two keys.

The body is JSON, its exact bytes signed twice: by the site's identity (Ed25519) and by its
SuperNode's key (ECDSA P-384). Both keys are made at the site and never leave it.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from starlette.concurrency import run_in_threadpool

from veilgraft.errors import InputError, MessageError
from veilgraft.identity import PublicKey
from veilgraft_server.fleet import check_node_signature
from veilgraft_server.registry import Member, Registry
from veilgraft_server.superlink import SuperLink, UnavailableError

MAX_BYTES = 8192
CLOCK_SECONDS = 300
"""How far a site's clock may be off."""

SIGNATURE_HEADER = "x-veilgraft-signature"
NODE_SIGNATURE_HEADER = "x-veilgraft-node-signature"
_LOG = logging.getLogger(__name__)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    site: Annotated[str, StringConstraints(max_length=100)]
    token: Annotated[str, StringConstraints(max_length=100)]
    identity: Annotated[str, StringConstraints(max_length=100)]
    node: Annotated[str, StringConstraints(max_length=1000)]
    time: int


@dataclass(frozen=True)
class Proven:
    """An enrolment whose two proofs hold; its token has not been looked at.

    Attributes:
        node: the SuperNode's public key, as the PEM that Flower writes.
    """

    site: str
    token: str
    identity: PublicKey
    node: bytes


def prove(body: bytes, headers: Mapping[str, str], now: float) -> Proven:
    """Return what a request says once it is shown that both keys' holders say it.

    Args:
        now: seconds since 1970.

    Raises:
        MessageError: it is not of the agreed form, not of this time, or a proof fails.
    """
    try:
        said = _Body.model_validate_json(body)
        identity = PublicKey.parse(said.identity)
        signature = bytes.fromhex(headers[SIGNATURE_HEADER])
        node_signature = bytes.fromhex(headers[NODE_SIGNATURE_HEADER])
        node = _canonical(said.node)
    except (ValidationError, InputError, KeyError, ValueError, UnsupportedAlgorithm):
        raise MessageError("enrolment: malformed") from None
    if abs(now - said.time) > CLOCK_SECONDS:
        raise MessageError("enrolment: the clock is off")
    identity.verify("enrolment", body, signature)
    check_node_signature(node, body, node_signature)
    return Proven(said.site, said.token, identity, node)


def _canonical(pem: str) -> bytes:
    key = load_pem_public_key(pem.encode())
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise MessageError("enrolment: expected an ECDSA key on P-384")
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class Enrolment:
    """Takes proven enrolments, one after the other."""

    def __init__(self, registry: Registry, superlink: SuperLink) -> None:
        self._registry = registry
        self._superlink = superlink
        self._turn = asyncio.Lock()

    async def take(self, body: bytes, headers: Mapping[str, str]) -> Member:
        """Make a site a member; return it as it then stands, its `node_id` set.

        The same token from the same keys gets the same answer.

        Raises:
            MessageError: a proof fails.
            RefusedError: the token, or a key, is not good.
            UnavailableError: SuperLink did not answer; the token is as good as before.
        """
        proven = await run_in_threadpool(prove, body, headers, time.time())
        async with self._turn:
            return await self._enrol(proven)

    async def _enrol(self, proven: Proven) -> Member:
        member = await run_in_threadpool(
            self._registry.enrol,
            proven.site,
            proven.token,
            proven.identity,
            proven.node,
            time.time(),
        )
        if member.node_id is not None:
            return member
        try:
            node_id = await self._superlink.register(proven.node, proven.site)
        except UnavailableError:
            await run_in_threadpool(self._registry.release, proven.site, proven.node)
            raise
        if node_id is None:
            await run_in_threadpool(self._registry.release, proven.site, proven.node)
            raise MessageError("enrolment: SuperLink does not take the node's key")
        await run_in_threadpool(self._registry.registered, proven.site, node_id)
        _LOG.info("%s has enrolled", proven.site)
        return replace(member, node_id=node_id)
