# SPDX-License-Identifier: MIT
"""The daemon's configuration: one YAML file, one model, every value with its unit and limits."""

from __future__ import annotations

import re
from collections.abc import Hashable
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from sockmi.addresses import Endpoint, parse_address
from sockmi.problems import problems
from sockmi.protocol.records import IMAGE_BYTES_MAX
from sockmi.redirect.base import Mode
from sockmi.unread import unread

with unread("zoneinfo", ZoneInfo=type("ZoneInfo", (), {}), ZoneInfoNotFoundError=KeyError):
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        ValidationError,
        model_validator,
    )

with unread("yaml"):  # no writer, no libyaml
    from yaml.constructor import ConstructorError
    from yaml.error import YAMLError
    from yaml.loader import SafeLoader
    from yaml.nodes import MappingNode, ScalarNode


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{path} is relative; give a path that begins with /")
    return path


def _host_name(text: str) -> str:
    if len(text.encode()) > 64 or not text.isprintable():
        raise ValueError("at most 64 bytes (UTF-8), all printable")
    return text


def _group_name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", text):
        raise ValueError(f"{text!r}: up to 32 of a-z, 0-9 and '-', beginning with a letter or digit")
    return text


def _mode(bits: int) -> int:
    if not 0 <= bits <= 0o777:
        raise ValueError(f"{bits}: give an octal number from 0000 to 0777; it begins with 0, as 0660")
    return bits


def _address(value: object) -> object:
    if isinstance(value, str):
        try:
            return parse_address(value)
        except ValueError:
            raise ValueError(f"{value!r} is no IP address") from None
    return value


def _member(text: str) -> str:
    try:
        ip_address(text)
    except ValueError:
        try:
            Endpoint.parse(text)
        except ValueError:
            raise ValueError(
                f"{text!r} is neither an address nor ADDRESS:PORT (of IPv6: [ADDRESS]:PORT)"
            ) from None
    return text


def _reachable(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    if address.is_unspecified or address.is_multicast or address.is_link_local:
        raise ValueError(
            f"{address}: other hosts cannot connect to it; give an address of this host, "
            "or leave it out to listen at all of them"
        )
    return address


def _route_table(number: int) -> int:
    if number in range(253, 256):
        raise ValueError("253, 254 and 255 are the kernel's own tables; choose another")
    return number


Port = Annotated[int, Field(ge=1, le=0xFFFF)]
Address = Annotated[IPv4Address | IPv6Address, BeforeValidator(_address)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class ConfigError(Exception):
    """The configuration cannot be used; the text says where, why and what to do."""


class _Loader(SafeLoader):
    """SafeLoader, but an option that stands there twice is an error: which one is meant?"""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As SafeLoader."""
        seen: set[Any] = set()
        for key, _unused in node.value:
            if isinstance(key, ScalarNode):
                if key.value in seen:
                    raise ConstructorError(
                        None, None, f"option {key.value!r} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# Whoever makes the first model looks for plugins of pydantic, with 2 MB of modules. We have none.
with unread("importlib.metadata", entry_points=lambda **_unused: ()):

    class Strict(BaseModel):
        """Unknown keys are errors: a misspelt option must not be ignored silently."""

        model_config = ConfigDict(extra="forbid", frozen=True)


class GroupConfig(Strict):
    """One group of daemons that negotiate with each other (paper, section 3.2)."""

    name: Annotated[str, AfterValidator(_group_name)] = "default"
    address: Address = IPv4Address("239.77.83.1")
    port: Port = 7780
    interface: Annotated[str, Field(min_length=1, max_length=15)] | None = None
    key_file: AbsolutePath = Path("/etc/sockmi/group.key")
    members: tuple[Annotated[str, AfterValidator(_member)], ...] = Field(
        (), description="ADDRESS or ADDRESS:PORT of each other daemon, for networks without multicast"
    )
    announce_interval_s: Annotated[float, Field(ge=0.2, le=3600)] = 10.0
    hops: Annotated[int, Field(ge=0, le=255)] = 1

    @model_validator(mode="after")
    def _multicast(self) -> Self:
        if not self.members and not self.address.is_multicast:
            raise ValueError(
                f"group {self.name!r}: {self.address} is not a multicast address; "
                "choose one (239.0.0.0/8, ff05::/16) or list the members"
            )
        return self


class StreamConfig(Strict):
    """TLS streams between daemons, which carry the images."""

    address: Annotated[Address, AfterValidator(_reachable)] | None = None
    port: Annotated[int, Field(ge=0, le=0xFFFF)] = 7781


class ImportConfig(Strict):
    """The three import lists (paper, section 3.1) and who may take from them."""

    max_bound: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    max_listening: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    max_connected: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    listed_warn_s: Annotated[float, Field(ge=0, le=1e9)] = Field(
        300.0, description="warn of a socket that has waited so long in the import list; 0: never"
    )
    listed_max_s: Annotated[float, Field(ge=0, le=1e9)] = Field(
        0.0, description="end a socket that has waited so long, by a RST to its peer; 0: never"
    )
    queue_without_waiting: bool = Field(
        True, description="accept sockets for which no application waits yet; they stay in the list, held"
    )
    deliver: bool = Field(
        False,
        description="give connections that no application waits for to the program that listens for them",
    )


class TimingConfig(Strict):
    """Deadlines of a migration."""

    freeze_deadline_s: Annotated[float, Field(ge=0.02, le=5.0)] = 0.5
    request_interval_s: Annotated[float, Field(ge=0.005, le=5.0)] = 0.05
    offer_grace_s: Annotated[float, Field(ge=0, le=5.0)] | None = Field(
        None,
        description="none: as the policy needs it (sockmi/policy.py)",
    )
    negotiation_timeout_s: Annotated[float, Field(ge=0.05, le=60.0)] = 2.0
    lease_s: Annotated[float, Field(ge=0.1, le=300.0)] = 10.0
    linger_s: Annotated[float, Field(ge=1, le=600)] = 120.0
    audit_interval_s: Annotated[float, Field(ge=0.2, le=3600)] = 30.0
    look_again_s: Annotated[float, Field(ge=0.1, le=60)] = Field(
        10.0, description="how often to see whether a closed connection has left TIME-WAIT"
    )


class RedirectConfig(Strict):
    """How the peer's packets reach the importer."""

    modes: tuple[Mode, ...] = (Mode.FORWARD, Mode.NAT)
    table: str = Field("sockmi", pattern=r"^[a-z][a-z0-9_]{0,24}$")
    devices: tuple[str, ...] = Field((), description="ingress devices; empty: all that are up, but lo")
    mark: Annotated[int, Field(ge=1 << 20, le=0xFFF00000, multiple_of=1 << 20)] = 0x53400000
    route_table: Annotated[int, Field(ge=1, le=0xFFFFFFFF), AfterValidator(_route_table)] = 7780
    log_group: Annotated[int, Field(ge=1, le=0xFFFF)] = 7783
    rule_priority: Annotated[int, Field(ge=1, le=32765)] = 77

    @model_validator(mode="after")
    def _some_mode(self) -> Self:
        if not self.modes or len(set(self.modes)) != len(self.modes):
            raise ValueError("redirect.modes: name at least one mode, each once")
        return self


LIVE = frozenset({"timing", "imports", "policy", "weight", "chunk_size", "pipeline_depth", "log_level"})
"""Options that a reload puts into effect."""


class Config(Strict):
    """Everything that an operator can choose."""

    state_dir: AbsolutePath = Path("/var/lib/sockmi")
    run_dir: AbsolutePath = Path("/run/sockmi")
    control_mode: Annotated[int, AfterValidator(_mode)] = 0o660
    host_name: Annotated[str, Field(min_length=1), AfterValidator(_host_name)] | None = None
    groups: tuple[GroupConfig, ...] = (GroupConfig(),)
    stream: StreamConfig = StreamConfig()
    imports: ImportConfig = ImportConfig()
    timing: TimingConfig = TimingConfig()
    redirect: RedirectConfig = RedirectConfig()
    engine: Literal["auto", "kernel", "repair"] = Field(
        "auto", description="auto: kernel if its module is loaded, else repair"
    )
    policy: Literal["first", "least-loaded", "weighted"] = "first"
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    chunk_size: Annotated[int, Field(ge=1, le=126)] = 32
    pipeline_depth: Annotated[int, Field(ge=1, le=4)] = 1
    image_bytes_max: Annotated[int, Field(ge=65536, le=IMAGE_BYTES_MAX)] = IMAGE_BYTES_MAX
    metrics_address: Address = IPv4Address("127.0.0.1")
    metrics_port: Annotated[int, Field(ge=0, le=0xFFFF)] = Field(0, description="0: no metrics")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @model_validator(mode="after")
    def _groups(self) -> Self:
        names = [group.name for group in self.groups]
        if not names or len(set(names)) != len(names):
            raise ValueError("groups: name at least one group, and each name once")
        return self

    def differing(self, new: Config) -> tuple[list[str], list[str]]:
        """What is another in ``new``: options that take effect at once, and those that need a restart."""
        names = [name for name in type(self).model_fields if getattr(new, name) != getattr(self, name)]
        return [name for name in names if name in LIVE], [name for name in names if name not in LIVE]

    @property
    def control_path(self) -> Path:
        """The control socket."""
        return self.run_dir / "control.sock"

    @property
    def in_repair_path(self) -> Path:
        """Which sockets are in repair: for the next daemon, and gone with them when the host ends."""
        return self.run_dir / "in-repair"

    @property
    def journal_path(self) -> Path:
        """The SQLite journal."""
        return self.state_dir / "journal.db"

    @property
    def spool_dir(self) -> Path:
        """Images that this host has promised to be able to restore."""
        return self.state_dir / "spool"

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read and check a YAML file; raise ConfigError with file, place and reason."""
        try:
            return cls.parse(path.read_text(), str(path))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; create it or name another with --config") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not usable as YAML: {' '.join(str(error).split())}") from error

    @classmethod
    def parse(cls, text: str, path: str) -> Config:
        """The same of a text, which is called ``path``."""
        try:
            document = _Loader(text).get_single_data()
        except YAMLError as error:
            raise ConfigError(f"{path}: not usable as YAML: {' '.join(str(error).split())}") from error
        if document is None:
            document = {}
        if not isinstance(document, dict):
            raise ConfigError(f"{path}: expected a mapping of options, found {type(document).__name__}")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise ConfigError(f"{path}: " + "; ".join(problems(error))) from None
