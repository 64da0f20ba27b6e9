# SPDX-License-Identifier: MIT
"""The group's keys: who has one belongs to the group."""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sockmi.transport.identity import IdentityError, read_private_file, write_private_file

KEY_BYTES = 32
KEY_ID_BYTES = 4
_KEYS_MAX = 8
_FILE_BYTES_MAX = 65536


class KeyFileError(Exception):
    """The key file cannot be used; the text says where, why and what to do. It never shows a key."""


def key_id_of(key: bytes) -> bytes:
    """A public name for a key, from which nothing about the key can be learnt."""
    return HKDF(hashes.SHA256(), KEY_ID_BYTES, salt=None, info=b"sockmi key id 1").derive(key)


@dataclass(frozen=True, slots=True, repr=False)
class Keyring:
    """The keys in order of the file: the first one seals, all of them open.

    To change the key of a running group, reloading all daemons after each step: add the new key
    as the last line; make it the first; remove the old one.
    """

    keys: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.keys) <= _KEYS_MAX:
            raise ValueError(f"{len(self.keys)} keys, expected 1 to {_KEYS_MAX}")
        if any(len(key) != KEY_BYTES for key in self.keys):
            raise ValueError(f"every key must have {KEY_BYTES} bytes")
        if any(len(set(key)) < 8 for key in self.keys):
            raise ValueError("a key is not random; make one: `sockmi key FILE`")
        if len(self.by_id()) != len(self.keys):
            raise ValueError("the same key twice")

    def __repr__(self) -> str:
        return f"Keyring({', '.join(key_id.hex() for key_id in self.by_id())})"

    def by_id(self) -> dict[bytes, bytes]:
        """Key id -> key, in order."""
        return {key_id_of(key): key for key in self.keys}

    @classmethod
    def load(cls, path: Path) -> Keyring:
        """Read a key file: a key a line, 64 hexadecimal digits or base64; ``#`` starts a comment.

        Raises KeyFileError, also if anybody but the owner can read the file.
        """
        try:
            remedy = "make a key, or copy the group's from a member"
            content = read_private_file(path, _FILE_BYTES_MAX, remedy=remedy)
        except IdentityError as error:
            raise KeyFileError(str(error)) from error
        keys = []
        for number, line in enumerate(content.split(b"\n"), 1):
            text = line.partition(b"#")[0].strip()
            if text:
                key = _decode(text)
                if key is None:
                    raise KeyFileError(
                        f"{path}, line {number}: not a key; expected {KEY_BYTES} bytes as {KEY_BYTES * 2} "
                        "hexadecimal digits or as base64"
                    )
                keys.append(key)
        try:
            return cls(tuple(keys))
        except ValueError as error:
            raise KeyFileError(f"{path}: {error}") from error


def generate(path: Path) -> Keyring:
    """Write a new key file with one fresh key, mode 0600; KeyFileError if ``path`` exists."""
    key = os.urandom(KEY_BYTES)
    try:
        write_private_file(path, key.hex().encode() + b"\n", replace=False)
    except FileExistsError as error:
        raise KeyFileError(f"{path}: exists already; remove it first, or add a line to it") from error
    except FileNotFoundError as error:
        raise KeyFileError(f"{path}: there is no folder {path.parent}; make it first") from error
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error
    return Keyring((key,))


def _decode(text: bytes) -> bytes | None:
    try:
        key = bytes.fromhex(text.decode("ascii")) if len(text) == KEY_BYTES * 2 else None
        key = key or base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return key if len(key) == KEY_BYTES else None
