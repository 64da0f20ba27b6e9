# SPDX-License-Identifier: MIT
"""A lab: made whole or not at all, and removed without a trace."""

from __future__ import annotations

import shutil
from types import TracebackType
from typing import Self

from lab import namespaces, network, record
from lab.host import Host
from lab.plan import HOSTS, LabError, checked_name, namespaces_of
from lab.record import Record


class Lab:
    """A lab of this process: ``with Lab("demo") as lab: lab.host("a").run(["ip", "address"])``.

    On leaving, all its processes are ended and its namespaces and files removed. If this
    process is killed, the next start of any lab does that instead (`sweep`). A lab made with
    ``persistent`` stays until it is taken `down`.
    """

    def __init__(self, name: str, *, persistent: bool = False) -> None:
        self.name = checked_name(name)
        self.persistent = persistent
        self.hosts = {plan.name: Host(name, plan) for plan in HOSTS.values()}

    def host(self, name: str) -> Host:
        """A host by name: router, peer, a, b, c or d."""
        try:
            return self.hosts[name]
        except KeyError:
            raise LabError(f"a lab has no host {name!r}; its hosts are {', '.join(self.hosts)}") from None

    def up(self) -> bool:
        """Make the lab; False if a persistent one is there already. Raise LabError if it is somebody's."""
        with record.locked():
            sweep()
            found = record.read(self.name)
            if found is not None:
                if found.persistent and self.persistent and not self.missing():
                    return False
                if not found.persistent or not self.persistent:
                    raise LabError(_occupied(found))
                self._remove()
            ours = record.own_record(self.name, persistent=self.persistent)
            record.write(ours)
            try:
                network.build(self.name)
                for host in self.hosts.values():
                    for directory in (host.etc_dir, host.state_dir, host.run_dir):
                        directory.mkdir(parents=True, exist_ok=True)
            except BaseException:
                self._remove()
                raise
            record.write(Record(self.name, ours.owner_pid, ours.owner_start_ticks, self.persistent, True))
        return True

    def down(self) -> bool:
        """Remove the lab; False if there was none. Raise LabError if it is another process's."""
        with record.locked():
            found = record.read(self.name)
            if found is None:
                return False
            ours = record.own_record(self.name, persistent=self.persistent)
            if found.alive and not found.persistent and found.owner_pid != ours.owner_pid:
                raise LabError(_occupied(found))
            self._remove()
        return True

    def missing(self) -> list[str]:
        """Namespaces of a made lab that are gone (someone removed them, or the machine is another)."""
        return [name for name in namespaces_of(self.name) if not namespaces.exists(name)]

    def _remove(self) -> None:
        network.demolish(self.name)
        shutil.rmtree(record.ROOT / self.name, ignore_errors=True)

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()


def sweep() -> list[str]:
    """Remove every lab whose owner is dead, and nothing else; their names. The lock must be held."""
    swept = []
    for found in record.read_all():
        if not found.alive:
            network.demolish(found.name)
            shutil.rmtree(found.directory, ignore_errors=True)
            swept.append(found.name)
    return swept


def _occupied(found: Record) -> str:
    if found.persistent:
        return f"lab {found.name} is up; take it down first: python3 -m lab down --lab {found.name}"
    return f"lab {found.name} belongs to the running process {found.owner_pid}; choose another name"
