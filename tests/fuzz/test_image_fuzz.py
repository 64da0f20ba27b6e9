# SPDX-License-Identifier: MIT
"""No input makes the image codecs crash, hang, read beyond it, or disagree with each other.

Seeds are printed; ``SOCKMI_FUZZ_SEED`` repeats a run, ``SOCKMI_FUZZ_SECONDS`` makes it longer.
"""

# ruff: noqa: S311 (repeatable randomness is what a test wants)

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import struct
import subprocess
import time
import tracemalloc
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from sockmi.image import codec, patch
from sockmi.image import sections as s
from sockmi.image.words import ImageError
from tests.fuzz.image_samples import COMPILE, SOURCES, build_library, random_image, verdict

SECONDS = float(os.environ.get("SOCKMI_FUZZ_SECONDS", "6"))
DRIVER = Path(__file__).with_name("image_fuzz.c")
SANITIZE = ["-g", "-O1", "-fno-sanitize-recover=all"]
INTERESTING = (0, 1, 2, 7, 14, 15, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@pytest.fixture(scope="module")
def seed() -> int:
    value = int(os.environ.get("SOCKMI_FUZZ_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"SOCKMI_FUZZ_SEED={value}")
    return value


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    for index in range(60):
        image = codec.pack(random_image(random.Random(seed + index)))
        (directory / str(index)).write_bytes(image)
    return directory


def test_c_codec_under_sanitizers(tmp_path: Path, corpus: Path, seed: int) -> None:
    target = tmp_path / "image_fuzz"
    subprocess.run(
        [
            "gcc",
            *SANITIZE,
            "-fsanitize=address,undefined",
            *COMPILE,
            str(DRIVER),
            *map(str, SOURCES),
            "-o",
            str(target),
        ],
        check=True,
        timeout=120,
    )
    run = subprocess.run(
        [str(target), str(seed), str(max(1, int(SECONDS))), *map(str, corpus.iterdir())],
        capture_output=True,
        check=False,
        text=True,
        timeout=SECONDS * 3 + 30,
    )
    assert run.returncode == 0, f"seed {seed}\n{run.stdout}{run.stderr}"
    _unused, runs, _unused, accepted = run.stdout.split()
    print(run.stdout)
    assert int(runs) > 1000
    assert int(accepted) > 100  # it gets beyond the checksum


def test_c_codec_under_libfuzzer(tmp_path: Path, corpus: Path, seed: int) -> None:
    target = tmp_path / "image_libfuzzer"
    if not shutil.which("clang"):
        pytest.skip("clang is not installed; the driver above has run")
    flags = [*SANITIZE, "-fsanitize=fuzzer,address,undefined", "-DSOCKMI_LIBFUZZER", *COMPILE]
    built = subprocess.run(
        ["clang", *flags, str(DRIVER), *map(str, SOURCES), "-o", str(target)],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    if "libclang_rt.fuzzer" in built.stderr:
        pytest.skip("clang has no libFuzzer; the driver above has run")
    assert built.returncode == 0, built.stderr
    run = subprocess.run(
        [
            str(target),
            f"-seed={seed % (1 << 31) or 1}",
            f"-max_total_time={max(1, int(SECONDS / 2))}",
            "-timeout=5",
            "-malloc_limit_mb=4",
            "-max_len=65536",
            f"-artifact_prefix={tmp_path}/",
            str(corpus),
        ],
        capture_output=True,
        check=False,
        text=True,
        timeout=SECONDS * 3 + 30,
    )
    assert run.returncode == 0, f"seed {seed}\n{run.stderr[-4000:]}"


def change_field(rng: random.Random, image: s.Image) -> None:
    """Change one field anywhere in an image."""
    targets: list[Any] = []
    pending: list[Any] = [image]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(value)
        elif is_dataclass(value) and not isinstance(value, s.Place):
            targets.append(value)
            pending.extend(getattr(value, field.name) for field in fields(value))
    target = rng.choice(targets)
    name = rng.choice(fields(target)).name
    old = getattr(target, name)
    if isinstance(old, int):
        new: Any = rng.choice(
            (rng.choice(INTERESTING), old ^ 1 << rng.randrange(32), old + 1, max(0, old - 1))
        )
    elif isinstance(old, bytes):
        new = rng.choice((old[:-1], old + b"\0", bytes(len(old)), rng.randbytes(rng.randrange(20))))
    elif isinstance(old, list):
        new = rng.choice((old[:-1], old + old[:1], old[::-1]))
    elif isinstance(old, s.Place):
        new = s.Place(rng.choice((old.address, bytes(16), rng.randbytes(16))), rng.choice((0, old.port)), 0)
    else:
        new = None
    if target is image and name == "identity":
        return
    setattr(target, name, new)


def change_bytes(rng: random.Random, image: bytes) -> bytes:
    """Change bytes, words or the length; mostly with a header that fits."""
    changed = bytearray(image)
    for _turn in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed))
        match rng.randrange(5):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at & ~3 <= len(changed) - 4:
                struct.pack_into("<I", changed, at & ~3, rng.choice(INTERESTING))
            case 2 if at & ~1 <= len(changed) - 2:
                struct.pack_into("<H", changed, at & ~1, rng.randrange(40))
            case 3:
                del changed[at & ~7 : (at & ~7) + 8]
            case 4:
                changed[at & ~7 : at & ~7] = changed[at & ~7 : (at & ~7) + rng.randrange(8) * 8]
        if len(changed) < 64:
            break
    if len(changed) >= 32 and rng.random() < 0.95:
        struct.pack_into("<Q", changed, 16, len(changed))
        struct.pack_into("<I", changed, 28, codec.checksum(changed))
    return bytes(changed)


def verdict_of_python(image: bytes) -> str:
    try:
        codec.decode(image)
    except ImageError as error:
        return error.error_class.value
    return "ok"


def test_c_and_python_agree(tmp_path: Path, seed: int) -> None:
    library: ctypes.CDLL = build_library(tmp_path)
    rng = random.Random(seed)
    end = time.monotonic() + SECONDS
    seen: dict[str, int] = {}
    while time.monotonic() < end:
        image = random_image(rng)
        if rng.random() < 0.6:
            for _turn in range(rng.randrange(1, 3)):
                change_field(rng, image)
            try:
                data = codec.pack(image)
            except (ImageError, AttributeError):
                continue  # does not fit its field: no bytes to compare
        else:
            data = change_bytes(rng, codec.pack(image))
        expected = verdict_of_python(data)
        found, message = verdict(library, data)
        assert found == expected, f"seed {seed}: C {found} ({message}), Python {expected}: {data.hex()}"
        seen[found] = seen.get(found, 0) + 1
        for reader in (patch.peek, lambda b: patch.stamp(b, hop=1), lambda b: patch.with_context(b, b"x")):
            with contextlib.suppress(ImageError):
                reader(data)
    print(seen)
    assert len(seen) > 10, seen  # most kinds of error were met


def test_python_allocates_no_more_than_the_input_deserves() -> None:
    """Lengths that lie (4 GiB in a section, an option, a segment) cost nothing."""
    tracemalloc.start()
    try:
        for section, payload in ((22, b""), (9, struct.pack("<HBBI", 111, 2, 0, 0xFFFFFFF0)),
                                 (13, struct.pack("<II", 1, 0xFFFFFFF0))):  # fmt: skip
            head = struct.pack("<HHI", section, 0, len(payload) or 0xFFFFFFF0)
            good = codec.pack(random_image(random.Random(1)))
            body = good[32:] + head + payload
            lying = codec.seal(body, struct.unpack_from("<I", good, 24)[0] + 1)
            with pytest.raises(ImageError):
                codec.decode(lying)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
