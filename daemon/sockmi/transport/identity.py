# SPDX-License-Identifier: MIT
"""Who this host is: its id, its private key and its self-made certificate, kept across restarts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sockmi.frozen import frozen

HostId: TypeAlias = bytes
"""16 random bytes (a version 4 UUID), made once per host; also the CN of its certificate."""

HOST_ID_BYTES = 16
CERTIFICATE_BYTES_MAX = 500
_FILE_BYTES_MAX = 16384
# The certificates are pinned by fingerprint, so their dates mean nothing; these never fail on a wrong clock.
_NOT_BEFORE = datetime(1970, 1, 1, tzinfo=UTC)
_NOT_AFTER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


class IdentityError(Exception):
    """The identity file or a certificate cannot be used; the text says where, why and what to do."""


def read_private_file(path: Path, size_max: int, *, remedy: str) -> bytes:
    """The content of a secret file, if it is a regular file that only its owner can read.

    The owner must be root or the daemon's own user. Raises IdentityError; ``remedy`` ends its
    text when the file is missing. FileNotFoundError stays one of its causes.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = f"; {remedy}" if isinstance(error, FileNotFoundError) else ""
        raise IdentityError(f"{path}: {error.strerror}{hint}") from error
    try:  # by descriptor, so that what is checked is what is read
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise IdentityError(f"{path}: not a regular file")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise IdentityError(f"{path}: mode {mode:04o} lets others read it; run `chmod 0600 {path}`")
        if status.st_uid not in (0, os.geteuid()):
            raise IdentityError(f"{path}: belongs to user {status.st_uid}; run `chown root: {path}`")
        content = os.read(fd, size_max + 1)
    finally:
        os.close(fd)
    if len(content) > size_max:
        raise IdentityError(f"{path}: larger than {size_max} bytes")
    return content


def write_private_file(path: Path, content: bytes, *, replace: bool) -> None:
    """Write a new file of mode 0600 all at once and durably; FileExistsError unless ``replace``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:  # noqa: PTH123
            os.fchmod(fd, 0o600)
            file.write(content)
            file.flush()
            os.fsync(fd)
        if replace:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)  # unlike rename, fails if the name is taken
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def fingerprint_of(certificate: bytes) -> bytes:
    """SHA-256 of a DER certificate, 32 bytes."""
    return hashlib.sha256(certificate).digest()


def check_certificate(certificate: bytes) -> HostId:
    """The host id in a certificate of ours; IdentityError if it is none (kind of key, name, signature)."""
    if len(certificate) > CERTIFICATE_BYTES_MAX:
        raise IdentityError(f"certificate of {len(certificate)} bytes, more than {CERTIFICATE_BYTES_MAX}")
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        key = parsed.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise IdentityError("certificate without a P-256 key")
        (name,) = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        parsed.verify_directly_issued_by(parsed)
        return UUID(str(name.value)).bytes
    except IdentityError:
        raise
    except Exception as error:  # the library raises many kinds for what a hostile certificate may hold
        raise IdentityError(f"not a certificate of this kind: {error or type(error).__name__}") from error


@frozen
class Identity:
    """This host: ``path`` is the PEM file with the private key and the certificate (DER here)."""

    host_id: HostId
    certificate: bytes
    path: Path

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate."""
        return fingerprint_of(self.certificate)

    @classmethod
    def load_or_create(cls, state_dir: Path) -> Identity:
        """Read ``state_dir/identity.pem``; at the first start make it, with a fresh host id.

        Raises IdentityError. A copy of this file on a second host makes two hosts with one id:
        they ignore each other (see Seal.counters, ``own_id_elsewhere``).
        """
        path = state_dir / "identity.pem"
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # another start was faster: use its file
                try:
                    write_private_file(path, _make_pem(), replace=False)
                except FileExistsError:
                    raise
                except OSError as error:
                    text = f"{path}: {error.strerror}; is {state_dir} a writable directory?"
                    raise IdentityError(text) from error
        pem = read_private_file(path, _FILE_BYTES_MAX, remedy="restart the daemon to make a new one")
        remedy = f"restore {path} from a backup, or remove it: the host then gets a new id"
        try:
            key = serialization.load_pem_private_key(pem, password=None)
            certificate = x509.load_pem_x509_certificate(pem)
            der = certificate.public_bytes(serialization.Encoding.DER)
            host_id = check_certificate(der)
        except (ValueError, TypeError, IdentityError) as error:
            raise IdentityError(f"{path}: damaged ({error}); {remedy}") from error
        if key.public_key() != certificate.public_key():
            raise IdentityError(f"{path}: the key and the certificate do not belong together; {remedy}")
        return cls(host_id, der, path)


def _make_pem() -> bytes:
    """A fresh key and certificate, both in one PEM file so that no crash can leave half of them."""
    # RFC 4122 version 4, so that the id reads well wherever UUIDs are shown.
    host_id = UUID(bytes=os.urandom(HOST_ID_BYTES), version=4)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(host_id))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .sign(key, hashes.SHA256())
    )
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
