"""Signatures: by which a team tells its own bundles from others'.

In: a bundle and an ed25519 key in PEM. Out: ``signature.json`` in the bundle, or the proof that who holds the key
signed it as it stands. A signature covers the manifest of the bundle and those of the targets built in it, and so, by
the checksums that they hold, every file that is read. Never: reads a file that the signature does not cover, makes
keys, or says that a bundle is the latest: an older one that was signed verifies too.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from tc_deploy import __version__
from tc_deploy.bundle import (
    MANIFEST,
    Document,
    canonical_json,
    check_files,
    foreign_names,
    kept_from_writers,
    read_document,
    reading,
    sha256_of_file,
    write_bytes,
)
from tc_deploy.errors import BundleError, UsageError, no_file
from tc_deploy.libraries import imported
from tc_deploy.manifest import BUNDLE_FOLDER, SIGNATURE, TargetManifest, read_manifest, read_target

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PASSWORD_VARIABLE: Final = "TC_DEPLOY_KEY_PASSWORD"  # noqa: S105 - its name
"""Environment variable that holds the password of an encrypted private key."""
_SERIALIZATION: Final = "cryptography.hazmat.primitives.serialization"
_PURPOSE: Final = b"tc-deploy bundle signature 1\n"
"""Stands before what is signed, so that a signature made for anything else never fits."""


class SignatureRecord(Document):
    """What lies in ``signature.json``."""

    kind: Literal["signature"]
    format_version: Literal[1]
    made_by: str
    signs: dict[str, str]
    """SHA-256 of each manifest by its path in the bundle: ``manifest.json``, ``onnxruntime/manifest.json``."""
    signature: str
    """Ed25519, in base64, over the purpose and the canonical JSON of ``signs``."""


def sign_bundle(path: Path, private_key: Path) -> SignatureRecord:
    """Sign a bundle and the targets built in it, as they stand; an earlier signature is replaced.

    Args:
        path: ``engines/NAME``.
        private_key: an ed25519 key in PEM, encrypted or not.

    Raises:
        BundleError: the bundle or a target is damaged, so it is not worth a signature.
        UsageError: the key cannot be read, or is of another kind.
        BackendError: ``cryptography`` is not installed.
        StorageError: the signature cannot be written.
    """
    key = _private_key(private_key)
    with reading(path, BUNDLE_FOLDER):  # which puts right what a process left that died while it replaced the bundle
        pass
    # Of a bundle that is replaced meanwhile it would be a signature over two, or in another.
    with kept_from_writers(path):
        targets = _targets(path)
        _check_whole(path, targets)
        signs = _manifests(path, targets)
        record = SignatureRecord(
            kind="signature",
            format_version=1,
            made_by=f"tc-deploy {__version__}",
            signs=signs,
            signature=base64.b64encode(key.sign(_message(signs))).decode(),
        )
        write_bytes(path / SIGNATURE, canonical_json(record.model_dump(mode="json")).encode())
    return record


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A bundle's signature, verified."""

    record: SignatureRecord
    uncovered: tuple[str, ...]
    """What else lies in the bundle, by path inside it: nobody signed it."""


def verify_bundle(path: Path, public_key: Path) -> Verification:
    """Check the signature of a bundle and every file that it covers, and look for what it does not cover.

    Args:
        path: ``engines/NAME``.
        public_key: the signer's, in PEM.

    Raises:
        BundleError: there is no signature, it is another key's, a manifest was changed, added or removed since, or a
            file is missing or altered.
        UsageError: the key cannot be read, or is of another kind.
        BackendError: ``cryptography`` is not installed.
    """
    with reading(path, BUNDLE_FOLDER):
        targets = _targets(path)
        record = check_signature(path, public_key, targets)
        gone = sorted(record.signs.keys() - _manifests(path, targets).keys())
        if gone:
            raise BundleError(f"{path / gone[0]}: was removed after the bundle was signed; build it again, then sign")
        covered = {*record.signs, SIGNATURE, *_check_whole(path, targets)}
        try:
            uncovered = tuple(foreign_names(path, covered))
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error}; what lies in it must be known to be covered") from None
    return Verification(record=record, uncovered=uncovered)


def check_signature(path: Path, public_key: Path, targets: Iterable[str]) -> SignatureRecord:
    """Check that a bundle's manifest and those of some targets are as they were signed; files are not looked at.

    Args:
        path: ``engines/NAME``.
        public_key: the signer's, in PEM.
        targets: the backends that are to be read.

    Raises:
        BundleError: there is no signature, it is another key's, or a manifest was changed or added since.
        UsageError: the key cannot be read, or is of another kind.
        BackendError: ``cryptography`` is not installed.
    """
    key = _public_key(public_key)
    again = f"tc-deploy sign {path} --key KEY"
    record = read_document(SignatureRecord, path / SIGNATURE, "signature", again)
    try:
        signature = base64.b64decode(record.signature, validate=True)
        if base64.b64encode(signature).decode("ascii") != record.signature:
            raise binascii.Error("bits to spare")  # two texts for one signature
        key.verify(signature, _message(record.signs))
    except (imported("cryptography.exceptions").InvalidSignature, binascii.Error):
        raise BundleError(
            f"{path}: not signed by the key {public_key}; take the bundle from where it was signed, or give its"
            " signer's public key"
        ) from None
    for name, found in _manifests(path, targets).items():
        signed = record.signs.get(name)
        if signed != found:
            what = "was added" if signed is None else "was changed"
            raise BundleError(f"{path / name}: {what} after the bundle was signed; do not use it, or: {again}")
    return record


def _targets(path: Path) -> list[str]:
    """The folders of a bundle in which a target was built."""
    return sorted(entry.parent.name for entry in path.glob(f"*/{MANIFEST}"))


def _manifests(path: Path, targets: Iterable[str]) -> dict[str, str]:
    names = [MANIFEST, *(f"{target}/{MANIFEST}" for target in targets)]
    try:
        return {name: sha256_of_file(path / name) for name in names}
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error}; make the bundle again") from None


def _check_whole(path: Path, targets: list[str]) -> list[str]:
    """Check every file that the manifests name, and give their paths inside the bundle."""
    files = read_manifest(path).files
    check_files(path, files)
    names = list(files)
    for target in targets:
        record: TargetManifest = read_target(path, target)
        check_files(path / target, record.files)
        names += [f"{target}/{name}" for name in record.files]
    return names


def _message(signs: dict[str, str]) -> bytes:
    return _PURPOSE + canonical_json(signs).encode()


def _private_key(path: Path) -> Ed25519PrivateKey:
    load_pem_private_key = imported(_SERIALIZATION).load_pem_private_key
    password = os.environ.get(PASSWORD_VARIABLE)

    def load(data: bytes) -> Any:
        try:
            return load_pem_private_key(data, password.encode() if password else None)
        except TypeError:  # a password and no encryption, or encryption and no password
            if password:
                return load_pem_private_key(data, None)
            raise UsageError(f"{path}: the key is encrypted; put its password into {PASSWORD_VARIABLE}") from None

    key = _key(path, load, "a private", "openssl genpkey -algorithm ed25519 -out key.pem")
    _check_ed25519(path, key, "Ed25519PrivateKey")
    return cast("Ed25519PrivateKey", key)


def _public_key(path: Path) -> Ed25519PublicKey:
    load_pem_public_key = imported(_SERIALIZATION).load_pem_public_key
    key = _key(path, load_pem_public_key, "a public", "openssl pkey -in key.pem -pubout -out key.pub.pem")
    _check_ed25519(path, key, "Ed25519PublicKey")
    return cast("Ed25519PublicKey", key)


def _check_ed25519(path: Path, key: Any, kind: str) -> None:
    if not isinstance(key, getattr(imported("cryptography.hazmat.primitives.asymmetric.ed25519"), kind)):
        raise UsageError(f"{path}: expected an ed25519 key, found {type(key).__name__.lstrip('_')}")


def _key(path: Path, load: Callable[[bytes], Any], what: str, maker: str) -> Any:
    unsupported = imported("cryptography.exceptions").UnsupportedAlgorithm
    if not path.is_file():
        raise UsageError(f"{path}: {no_file(path)}; expected {what} key in PEM, as is made with: {maker}")
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; make one with: {maker}") from None
    except (ValueError, unsupported):
        raise UsageError(f"{path}: not {what} key in PEM, or another password; make one with: {maker}") from None
