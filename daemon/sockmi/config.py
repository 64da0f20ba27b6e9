"""The daemon's configuration: one YAML file, one model, every value with its unit and limits."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sockmi.redirect.base import Mode

Port = Annotated[int, Field(ge=1, le=0xFFFF)]
Address = IPv4Address | IPv6Address


class ConfigError(Exception):
    """The configuration cannot be used; the text says where, why and what to do."""


class Strict(BaseModel):
    """Unknown keys are errors: a misspelt option must not be ignored silently."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GroupConfig(Strict):
    """One group of daemons that negotiate with each other (paper, section 3.2)."""

    name: str = Field("default", pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    address: Address = IPv4Address("239.77.83.1")
    port: Port = 7780
    interface: str | None = None
    key_file: Path = Path("/etc/sockmi/group.key")
    members: tuple[str, ...] = Field(
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

    address: Address | None = None
    port: Annotated[int, Field(ge=0, le=0xFFFF)] = 7781


class ImportConfig(Strict):
    """The three import lists (paper, section 3.1) and who may take from them."""

    max_bound: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    max_listening: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    max_connected: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    queue_without_waiting: bool = Field(
        True, description="accept sockets for which no application waits yet; they stay in the list, held"
    )


class TimingConfig(Strict):
    """Deadlines of a migration."""

    freeze_deadline_s: Annotated[float, Field(ge=0.02, le=5.0)] = 0.5
    request_interval_s: Annotated[float, Field(ge=0.005, le=5.0)] = 0.05
    negotiation_timeout_s: Annotated[float, Field(ge=0.05, le=60.0)] = 2.0
    lease_s: Annotated[float, Field(ge=0.1, le=300.0)] = 10.0
    linger_s: Annotated[float, Field(ge=1, le=600)] = 120.0
    audit_interval_s: Annotated[float, Field(ge=0.2, le=3600)] = 30.0


class RedirectConfig(Strict):
    """How the peer's packets reach the importer."""

    modes: tuple[Mode, ...] = (Mode.FORWARD, Mode.NAT)
    table: str = Field("sockmi", pattern=r"^[a-z][a-z0-9_]{0,24}$")
    devices: tuple[str, ...] = Field((), description="ingress devices; empty: all that are up, but lo")
    mark: Annotated[int, Field(ge=1 << 20, le=0xFFF00000, multiple_of=1 << 20)] = 0x53400000
    route_table: Annotated[int, Field(ge=1, le=0xFFFFFFFF)] = 7780
    rule_priority: Annotated[int, Field(ge=1, le=32765)] = 77

    @model_validator(mode="after")
    def _some_mode(self) -> Self:
        if not self.modes or len(set(self.modes)) != len(self.modes):
            raise ValueError("redirect.modes: name at least one mode, each once")
        return self


class Config(Strict):
    """Everything that an operator can choose."""

    state_dir: Path = Path("/var/lib/sockmi")
    run_dir: Path = Path("/run/sockmi")
    control_mode: Annotated[int, Field(ge=0, le=0o777)] = 0o660
    host_name: str | None = Field(None, max_length=64)
    groups: tuple[GroupConfig, ...] = (GroupConfig(),)
    stream: StreamConfig = StreamConfig()
    imports: ImportConfig = ImportConfig()
    timing: TimingConfig = TimingConfig()
    redirect: RedirectConfig = RedirectConfig()
    policy: Literal["first", "least-loaded", "weighted"] = "first"
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    chunk_size: Annotated[int, Field(ge=1, le=1024)] = 32
    pipeline_depth: Annotated[int, Field(ge=1, le=4)] = 1
    image_bytes_max: Annotated[int, Field(ge=65536, le=1 << 30)] = 64 << 20
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

    @property
    def control_path(self) -> Path:
        """The control socket."""
        return self.run_dir / "control.sock"

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
            document = yaml.safe_load(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; create it or name another with --config") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        if document is None:
            document = {}
        if not isinstance(document, dict):
            raise ConfigError(f"{path}: expected a mapping of options, found {type(document).__name__}")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            places = [
                f"{'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg']}"
                for problem in error.errors()
            ]
            raise ConfigError(f"{path}: " + "; ".join(places)) from None
