"""Names for the content of full KV blocks: equal names mean equal tokens, prefix and tenant."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

DIGEST_BYTES = 32
TENANT_BYTES = 8


def tenant_root(tenant: str) -> bytes:
    """The parent of a tenant's first blocks: no two tenants ever share a block."""
    return hashlib.blake2b(
        tenant.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES, person=b"kv-tenant"
    ).digest()


def hash_block(parent: bytes, token_ids: Iterable[int]) -> bytes:
    """The hash of a full block after ``parent`` (the previous block's hash, or `tenant_root`).

    A key or value depends on every token before it, so the hash chains over the whole prefix. It is
    cryptographic (BLAKE2b, RFC 7693, 192 bits, beside the bytes that name the tenant): equality is
    taken as proof, contents are not compared.
    """
    size = DIGEST_BYTES - TENANT_BYTES
    tokens = array("q", token_ids).tobytes()
    digest = hashlib.blake2b(parent + tokens, digest_size=size, person=b"kv-block").digest()
    return tenant_of(parent) + digest


def tenant_of(block_hash: bytes) -> bytes:
    """What the hashes of all blocks of one tenant begin with."""
    return block_hash[:TENANT_BYTES]
