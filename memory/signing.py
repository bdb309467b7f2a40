"""The store's signature under receipts and archives.

    algorithm     needs               who can check            what it proves
    ed25519       extra ``[crypto]``  whoever has the public   the holder of the private key said so
                                      key, without the store
    hmac-sha256   nothing             whoever has the secret   somebody with the key file said so;
                                      key, so the store only   who can check it can also forge it

Neither proves that what was said is true: that bytes are gone shows only by looking (`Receipt.verify`).
Keys lie in the store's folder, one file an algorithm, readable by its owner alone. A key is made when it is
first needed, whole or not at all, and once, also when two processes need it at the same moment.
"""

import hashlib
import hmac
import os
import secrets
import stat
import uuid
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field

from persona_sdk import files
from persona_sdk.config import FrozenConfig
from persona_sdk.errors import StoreError

Algorithm: TypeAlias = Literal["ed25519", "hmac-sha256"]
Standing: TypeAlias = Literal["known", "unknown", "invalid"]

ED25519: Algorithm = "ed25519"
HMAC: Algorithm = "hmac-sha256"
_KEY_BYTES = 32


class Signature(FrozenConfig):
    """A signature, and the key it can be checked with; ``public_key`` is empty for HMAC. All in hex."""

    algorithm: Algorithm
    key_id: str = Field(pattern=r"^[0-9a-f]{32}\z")
    value: str = Field(pattern=r"^([0-9a-f]{64}){1,2}\z")
    public_key: str = Field("", pattern=r"^([0-9a-f]{64})?\z")


def available() -> Algorithm:
    """The algorithm that new signatures have here."""
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError:
        return HMAC
    return ED25519


def key_file(folder: Path, algorithm: Algorithm) -> Path:
    """Where a store keeps a key."""
    return folder / f"signing-{algorithm}.key"


def sign(folder: Path, data: bytes) -> Signature:
    """Sign `data` with the key of the store in `folder`, which is made if there is none.

    Raises:
        StoreError: the key cannot be read or made.
    """
    algorithm = available()
    secret = _secret(folder, algorithm)
    if algorithm == HMAC:
        return Signature(algorithm=algorithm, key_id=key_id(algorithm, secret), value=_hmac(secret, data))
    private = _ed25519().Ed25519PrivateKey.from_private_bytes(secret)
    public = private.public_key().public_bytes_raw()
    return Signature(
        algorithm=algorithm,
        key_id=key_id(algorithm, public),
        value=private.sign(data).hex(),
        public_key=public.hex(),
    )


def require_key(folder: Path) -> None:
    """Make sure that `sign` will work, before something is done that shall be signed.

    Raises:
        StoreError: the key cannot be read or made.
    """
    _secret(folder, available())


def public_key(folder: Path) -> bytes | None:
    """The public key to hand to those who shall check this store's signatures; None with HMAC only."""
    return _public(_secret(folder, ED25519)) if available() == ED25519 else None


def standing(folder: Path | None, data: bytes, signature: Signature, trusted: Collection[bytes]) -> Standing:
    """Whose signature this is.

    ``known``: right, by this store or a `trusted` public key. ``unknown``: by somebody else, or nothing here
    can check it. ``invalid``: it does not belong to `data`, or its parts to each other.
    """
    if signature.algorithm == HMAC:
        secret = _existing(folder, HMAC)
        if secret is None or key_id(HMAC, secret) != signature.key_id:
            return "unknown"
        return "known" if hmac.compare_digest(_hmac(secret, data), signature.value) else "invalid"
    public = bytes.fromhex(signature.public_key)
    if key_id(ED25519, public) != signature.key_id:
        return "invalid"
    if available() != ED25519:
        return "unknown"
    if not verify(data, signature, public):
        return "invalid"
    own = _existing(folder, ED25519)
    mine = () if own is None else (_public(own),)
    return "known" if public in {*trusted, *mine} else "unknown"


def verify(data: bytes, signature: Signature, key: bytes) -> bool:
    """Whether `signature` is that of `data` by the Ed25519 public `key`; needs no store.

    Raises:
        StoreError: the extra ``[crypto]`` is not installed, or the key is none.
    """
    if signature.algorithm != ED25519 or len(signature.value) != 128:
        return False
    module = _ed25519()
    from cryptography.exceptions import InvalidSignature

    try:
        module.Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(signature.value), data)
    except InvalidSignature:
        return False
    except ValueError as error:
        raise StoreError("This is no Ed25519 public key.", hint="Expected its 32 raw bytes.") from error
    return True


def key_id(algorithm: Algorithm, key: bytes) -> str:
    """A name for a key: of the public half, or of a secret one without telling anything about it."""
    return hashlib.sha256(f"persona_sdk {algorithm} key".encode() + b"\0" + key).hexdigest()[:32]


def _hmac(secret: bytes, data: bytes) -> str:
    return hmac.digest(secret, data, "sha256").hex()


def _public(secret: bytes) -> bytes:
    public: bytes = _ed25519().Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    return public


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise StoreError(
            "Ed25519 needs the package cryptography.", hint="pip install 'persona-sdk[crypto]'."
        ) from error
    return ed25519


def _existing(folder: Path | None, algorithm: Algorithm) -> bytes | None:
    if folder is None or not key_file(folder, algorithm).exists():
        return None
    return _secret(folder, algorithm)


def _secret(folder: Path, algorithm: Algorithm) -> bytes:
    """The secret half, made on first use."""
    target = key_file(folder, algorithm)
    try:
        if not target.exists():
            _make(target)
        status = target.lstat()
        if not stat.S_ISREG(status.st_mode) or (os.name == "posix" and status.st_mode & 0o077):
            raise StoreError(
                f"The key {target.name} can be read by others, or is a link.",
                hint=f"Set its mode to 0600, and remove it if others may have copied it: {target}",
            )
        secret = target.read_bytes()
    except OSError as error:
        raise StoreError(
            f"The key {target.name} cannot be used: {error}.", hint="Check the folder's permissions."
        ) from error
    if len(secret) != _KEY_BYTES:
        raise StoreError(
            f"The key {target.name} is damaged.", hint="Restore it from a copy, or remove it for a new one."
        )
    return secret


def _make(target: Path) -> None:
    """Write a new key beside its place and link it there: the first process wins, the others take its key."""
    partial = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        files.sync(partial)
        with suppress(FileExistsError):
            os.link(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    files.sync(target.parent)
