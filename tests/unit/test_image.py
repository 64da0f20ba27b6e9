# SPDX-License-Identifier: MIT
"""The image codec: round trips, the daemon's small changes, and C and Python side by side."""

# ruff: noqa: S311 (repeatable randomness is what a test wants)

from __future__ import annotations

import ctypes
import random
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import fields
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sockmi.image as im
from sockmi.addresses import Endpoint
from sockmi.image import codec, native, parse
from sockmi.image import sections as s
from sockmi.image.options import BYTES_OPTIONS, Option
from sockmi.image.words import FidelityClass, Kind, Section, State
from tests.fuzz.image_samples import (
    COMPILE,
    CONNECTED_STATES,
    ENGINE,
    build_library,
    endpoint,
    random_image,
    verdict,
)

DOCUMENT = ENGINE.parents[2] / "docs" / "image.md"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_library(tmp_path_factory.mktemp("image"))


@pytest.fixture
def native_library(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    monkeypatch.setattr(native, "library", lambda: library)
    native._functions.cache_clear()
    yield library
    native._functions.cache_clear()


@given(st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_round_trip(rng: random.Random) -> None:
    image = random_image(rng)
    assert im.decode(im.encode(image)) == image


@pytest.mark.parametrize("state", CONNECTED_STATES)
@pytest.mark.parametrize("seed", range(20))
def test_every_state_is_accepted_by_both(library: ctypes.CDLL, state: State, seed: int) -> None:
    image = random_image(random.Random(seed), Kind.CONNECTED, state)
    encoded = im.encode(image)
    assert im.decode(encoded) == image
    assert verdict(library, encoded) == ("ok", "")


def test_crc_is_zlibs(library: ctypes.CDLL) -> None:
    rng = random.Random(1)
    library.sockmi_crc32.restype = ctypes.c_uint32
    for length in [*range(200), 1000, 4097, 70001]:
        data = rng.randbytes(length)
        assert library.sockmi_crc32(ctypes.c_uint32(77), data, ctypes.c_size_t(length)) == zlib.crc32(
            data, 77
        )


# ---- The daemon's view ----


@given(st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_peek_tells_what_decode_does(rng: random.Random) -> None:
    image = random_image(rng)
    encoded = im.encode(image)
    summary, identity = im.peek(encoded), image.identity
    assert (summary.family, summary.kind, summary.state) == (identity.family, identity.kind, identity.state)
    assert (summary.local_place, summary.remote_place) == (identity.local, identity.remote)
    assert (summary.local, summary.origin) == (identity.local.endpoint, identity.origin.endpoint)
    assert summary.remote == identity.remote.endpoint
    assert (summary.hop, summary.owner_uid) == (identity.hop, identity.owner_uid)
    assert summary[:3] == (identity.migration_id, identity.home_id, identity.listener_id)
    assert summary.v6only == bool(identity.v6only)
    queues = image.receive_queue, image.sent_queue, image.unsent_queue, image.context, encoded
    assert summary[-5:] == tuple(map(len, queues))


@given(st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_stamp(rng: random.Random) -> None:
    image = random_image(rng, Kind.CONNECTED)
    version = 4 if image.identity.local.is_mapped else 6
    origin = Endpoint(ip_address("192.0.2.99" if version == 4 else "2001:db8::99"), 443)
    ids = {name: rng.randbytes(16) for name in ("migration_id", "home_id", "listener_id")}
    stamped = im.stamp(im.encode(image), hop=5, origin=origin, **ids)
    image.identity.hop, image.identity.origin = 5, s.Place.of(origin)
    for name, value in ids.items():
        setattr(image.identity, name, value)
    assert im.decode(stamped) == image


def test_an_image_whose_socket_lives_elsewhere_by_now() -> None:
    """Its interface stays with its address."""
    image = random_image(random.Random(3), Kind.CONNECTED)
    image.identity.family, image.identity.v6only = 10, 0
    here = s.Place.of(Endpoint(ip_address("fe80::7"), 443), 5)
    image.identity.local = here
    image.identity.remote = s.Place.of(Endpoint(ip_address("fe80::9"), 4000), 5)
    image.identity.origin = s.Place()
    for address, scope_id in (("fe80::7", 5), ("fe80::8", 0)):
        local = Endpoint(ip_address(address), 8443)
        moved = im.peek(im.stamp(im.encode(image), local=local))
        assert moved.local_place == s.Place.of(local, scope_id)


def test_stamp_in_c_is_the_same(native_library: ctypes.CDLL) -> None:
    for seed in range(50):
        rng = random.Random(seed)
        encoded = im.encode(random_image(rng))
        changed = bytearray(encoded)
        home = rng.randbytes(16)
        native.stamp(changed, hop=seed, home_id=home, origin=s.Place())
        image = codec.decode(encoded)
        image.identity.hop, image.identity.home_id, image.identity.origin = seed, home, s.Place()
        assert changed == codec.pack(image)


def test_stamp_refuses(native_library: ctypes.CDLL) -> None:
    encoded = im.encode(random_image(random.Random(1)))
    with pytest.raises(ValueError, match="15 bytes"):
        im.stamp(encoded, home_id=bytes(15))
    with pytest.raises(ValueError, match="15 bytes"):
        native.stamp(bytearray(encoded), home_id=bytes(15))
    with pytest.raises(ValueError, match="32 bits"):
        im.stamp(encoded, hop=1 << 32)
    headless = codec.seal(codec.pack_section(Section.CONTEXT, bytes(200)), 1)
    for broken in (encoded[:-8], b"", encoded[:40], headless):
        with pytest.raises(im.ImageError):
            im.stamp(broken, hop=1)
        with pytest.raises(im.ImageError):
            native.stamp(bytearray(broken), hop=1)
        with pytest.raises(im.ImageError):
            im.peek(broken)
    cut = bytearray(encoded)
    cut[32 + 8 + 136 + 4 : 32 + 8 + 136 + 8] = b"\xff\xff\xff\x00"
    with pytest.raises(im.ImageError):
        im.peek(cut)


def test_context_and_fidelity_are_replaced(native_library: ctypes.CDLL) -> None:
    for seed in range(40):
        image = random_image(random.Random(seed))
        encoded = im.encode(image)
        names = [im.FidelityName(FidelityClass.RESET, "cwnd"), im.FidelityName(FidelityClass.CARRIED, "mss")]
        changed = im.with_fidelity(im.with_context(encoded, b"hello"), names)
        image.context, image.fidelity = b"hello", names
        assert im.decode(changed) == image
        assert im.decode(changed).fidelity_names(FidelityClass.RESET) == ["cwnd"]
        assert im.section(changed, Section.CONTEXT) == b"hello"
        assert native.with_section(encoded, Section.CONTEXT, b"hello") == im.with_context(encoded, b"hello")
        image.context = b""
        assert im.decode(im.with_context(changed, b"")) == image
        assert im.section(im.with_context(changed, b""), Section.CONTEXT) == b""
        assert native.with_section(changed, Section.CONTEXT, b"") == im.with_context(changed, b"")


def test_replacing_refuses(native_library: ctypes.CDLL) -> None:
    encoded = im.encode(random_image(random.Random(1)))
    with pytest.raises(ValueError, match="stamp"):
        im.with_section(encoded, Section.IDENTITY, bytes(136))
    with pytest.raises(ValueError, match="cannot be put"):
        native.with_section(encoded, Section.IDENTITY, bytes(136))
    with pytest.raises(im.ImageError):
        im.with_context(encoded, bytes((1 << 20) + 1))
    with pytest.raises(ValueError, match="cannot be put"):
        native.with_section(encoded, Section.CONTEXT, bytes((1 << 20) + 1))


def test_native_validate(native_library: ctypes.CDLL) -> None:
    encoded = im.encode(random_image(random.Random(1)))
    native.validate(encoded)
    with pytest.raises(im.ImageError) as caught:
        native.validate(encoded, len(encoded) - 1)
    assert caught.value.error_class is im.ErrorClass.LIMIT


def test_a_value_that_does_not_fit_is_an_image_error() -> None:
    image = random_image(random.Random(1))
    image.identity.hop = -1
    with pytest.raises(im.ImageError) as caught:
        im.encode(image)
    assert caught.value.error_class is im.ErrorClass.VALUE


def test_places() -> None:
    assert s.Place.of(None).is_none
    assert s.Place.of(None).endpoint is None
    assert endpoint("192.0.2.1 80").endpoint == Endpoint(ip_address("192.0.2.1"), 80)
    assert endpoint("2001:db8::1 80").endpoint == Endpoint(ip_address("2001:db8::1"), 80)
    assert State.FIN_WAIT_1.rfc_name == "FIN-WAIT-1"


# ---- One format, three descriptions ----


def test_options_of_c_and_python_and_the_document_agree() -> None:
    header = (ENGINE / "image_options.h").read_text()
    rows = re.findall(r"X\((\w+), (\d+), (INT|BYTES), (\w+), (\w+), (\d+)\)", header)
    assert {name: int(number) for name, number, *_unused in rows} == {
        option.name: int(option) for option in Option
    }
    assert {name for name, _unused, kind, *_unused in rows if kind == "BYTES"} == {
        option.name for option in BYTES_OPTIONS
    }
    document = DOCUMENT.read_text()
    for name, number, kind, *_unused in rows:
        assert re.search(rf"^\| {number} \| `{name}` \| {kind} ", document, re.MULTILINE), name


def test_sections_of_c_and_python_and_the_document_agree() -> None:
    header = (ENGINE / "image.h").read_text()
    document = DOCUMENT.read_text()
    for section in Section:
        assert re.search(rf"\bSOCKMI_{section.name} = {int(section)},", header), section
        assert re.search(rf"^### {int(section)} {section.name}\b", document, re.MULTILINE), section
        if section in parse.FIXED:
            for field in fields(parse.FIXED[section]):
                assert f"`{field.name}`" in document, (section, field.name)
    for error in im.ErrorClass:
        assert f"`{error.value}`" in document, error


def test_byte_order_of_every_layout(tmp_path: Path) -> None:
    """The layouts by which a big-endian host converts: swapped, it is big-endian."""
    program = tmp_path / "swap.c"
    program.write_text(
        """
        #include "image_internal.h"
        #include <stdio.h>
        int main(void)
        {
            for (int type = 1; type < SOCKMI_SECTION_END; type++) {
                unsigned char bytes[256], i = 0;
                if (!sockmi_sections[type].layout)
                    continue;
                do bytes[i] = i; while (++i);
                sockmi_wire_order(sockmi_sections[type].layout, bytes);
                printf("%d", type);
                for (unsigned int k = 0; k < 256; k++)
                    printf(" %d", bytes[k]);
                printf("\\n");
            }
        }
        """
    )
    target = tmp_path / "swap"
    subprocess.run(
        [
            "gcc",
            *COMPILE,
            "-DSOCKMI_TEST_SWAP",
            str(program),
            str(ENGINE / "image_wire.c"),
            "-o",
            str(target),
        ],
        check=True,
        timeout=60,
    )
    output = subprocess.run([str(target)], check=True, capture_output=True, text=True, timeout=10).stdout
    lines = output.splitlines()
    assert len(lines) == len(parse.FIXED)
    for line in lines:
        number, *values = map(int, line.split())
        kind = parse.FIXED[Section(number)]
        swapped, size = bytes(values), kind.size()
        assert swapped[size:] == bytes(range(size, 256))
        little, big = kind.LAYOUT, ">" + kind.LAYOUT[1:]
        assert struct.unpack(big, swapped[:size]) == struct.unpack(little, bytes(range(size))), number
