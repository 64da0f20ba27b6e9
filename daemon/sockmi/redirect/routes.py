# SPDX-License-Identifier: MIT
"""ip rules, routes, addresses and neighbours of this host, through pyroute2.

None of this is done per connection. Each call runs in a thread of its own, in the
caller's network namespace, because pyroute2's synchronous classes refuse to run inside an
asyncio loop; or in the daemon's worker (routes_worker.py), which has no loop, and keeps its socket.
"""

from __future__ import annotations

import errno
import functools
import socket
import threading
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sockmi.ip_versions import families
from sockmi.redirect.routes_worker import RoutesWorker
from sockmi.redirect.settings import Settings, Tag
from sockmi.redirect.ways import Address, Held, Way

P = ParamSpec("P")
T = TypeVar("T")

ARPHRD_ETHER = 1
RTN_UNICAST, RTN_LOCAL = 1, 2
_BEHIND = 1024  # what IPv6 routes have for a metric; more comes behind them
_PROTOCOL = 83  # rtm_protocol of the routes that are ours; not one of /etc/iproute2/rt_protos
_RTAX_LOCK_MTU = 1 << 2
_IFF_UP = 1
_IFF_LOOPBACK = 8
_IFA_F_NODAD = 0x02
_NTF_USE = 0x01
_TAG_MASK = 0xFFFF0000
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


def apart(work: Callable[[Any], T]) -> T:
    """Run ``work`` with a fresh IPRoute outside any asyncio loop of the caller."""
    from sockmi.redirect.netlink import IPRoute

    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with IPRoute() as ip:
                results.append(work(ip))
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, name="sockmi-routes")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _unless(codes: tuple[int, ...], call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call; a kernel answer that is one of ``codes`` (errno) is as good as success."""
    from sockmi.redirect.netlink import NetlinkError

    try:
        call(*args, **kwargs)
    except NetlinkError as error:
        if error.code not in codes:
            raise


def read_sysctl(name: str) -> int | None:
    """The first number of ``net/...`` in this network namespace, or None if the kernel has no such sysctl."""
    try:
        return int(Path("/proc/sys", name).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _asked(method: Callable[Concatenate[Routes, P], T]) -> Callable[Concatenate[Routes, P], T]:
    """Done by the worker, if there is one."""

    @functools.wraps(method)
    def ask(self: Routes, /, *arguments: P.args, **named: P.kwargs) -> T:
        if self.worker is None:
            return method(self, *arguments, **named)
        answer: T = self.worker.call(method.__name__, *arguments, **named)
        return answer

    return ask


class Routes:
    """What the redirects change in this host's routing. ``worker``: who does it instead of this process.

    ``ip``: the IPRoute that all calls use, in a process that has no asyncio loop; else each opens its own.
    """

    def __init__(self, settings: Settings, ip: Any = None) -> None:
        self._settings = settings
        self._ip = ip
        self.worker: RoutesWorker | None = None

    def _done(self, work: Callable[[Any], T]) -> T:
        return work(self._ip) if self._ip else apart(work)

    @_asked
    def devices(self, needed: bool = True) -> dict[str, int]:
        """Devices at which peers' packets arrive, and their indexes: the configured ones, or all fit ones.

        OSError if a configured one is not there, and ``needed``.
        """

        def work(ip: Any) -> dict[str, int]:
            links = {link.get("ifname"): link for link in ip.get_links()}
            if self._settings.devices:
                missing = [name for name in self._settings.devices if name not in links]
                if missing and needed:
                    raise OSError(
                        errno.ENODEV, f"redirect.devices: no device {', '.join(missing)}; see `ip link`"
                    )
                return {name: links[name]["index"] for name in self._settings.devices if name in links}
            addressed = {message["index"] for message in ip.get_addr()}
            return {
                name: link["index"]
                for name, link in links.items()
                if link["flags"] & _IFF_UP
                and not link["flags"] & _IFF_LOOPBACK
                and link["ifi_type"] == ARPHRD_ETHER
                and link["index"] in addressed
            }

        return self._done(work)

    @_asked
    def install(self, devices: list[str]) -> None:
        """Imported connections' packets are delivered locally, whatever their destination; idempotent.

        The rules name the device, so that the reverse look-up of rp_filter with
        src_valid_mark=1 does not meet them. A socket that is bound to a device gets what is injected by the
        route of that device; the others by that of the loopback device, which comes first.
        """

        def work(ip: Any) -> None:
            s = self._settings
            wanted = {(device, s.marked(Tag.LOCAL)) for device in devices} | {("lo", s.inject_mark)}
            # One that is gone or down by now has no route, and its rule waits for it.
            links = [link for name in ("lo", *devices) for link in ip.link_lookup(ifname=name)]
            for version, family in families().items():
                have: set[tuple[str | None, int | None]] = set()
                for rule in self._rules(ip, family):
                    iif, mark = rule.get("iifname"), rule.get("fwmark")
                    if (iif, mark) in wanted:
                        have.add((iif, mark))
                    else:
                        self._delete_rule(ip, family, iif, mark)
                for link in links:
                    _unless(
                        (errno.EEXIST, errno.ENETDOWN, errno.ENODEV),
                        ip.route,
                        "add",
                        family=family,
                        dst="0.0.0.0/0" if version == 4 else "::/0",
                        type="local",
                        scope="host" if version == 4 else "universe",
                        proto=_PROTOCOL,
                        oif=link,
                        table=s.route_table,
                        **({} if link == links[0] else {"priority": _BEHIND + link}),
                    )
                for device, mark in wanted - have:
                    ip.rule(
                        "add",
                        family=family,
                        iifname=device,
                        fwmark=mark,
                        fwmask=_TAG_MASK,
                        table=s.route_table,
                        priority=s.rule_priority,
                    )

        self._done(work)

    def _rules(self, ip: Any, family: int) -> list[Any]:
        s = self._settings
        return [
            rule
            for rule in ip.get_rules(family=family)
            if rule.get("table") == s.route_table and rule.get("priority") == s.rule_priority
        ]

    def _delete_rule(self, ip: Any, family: int, iif: str | None, mark: int | None) -> None:
        s = self._settings
        match = {"iifname": iif} if iif else {}
        if mark is not None:
            match |= {"fwmark": mark, "fwmask": _TAG_MASK}  # type: ignore[dict-item]
        _unless(
            (errno.ENOENT,),
            ip.rule,
            "del",
            family=family,
            table=s.route_table,
            priority=s.rule_priority,
            **match,
        )

    @_asked
    def remove(self) -> None:
        """Remove all rules and routes that are ours."""

        def work(ip: Any) -> None:
            for family in families().values():
                for rule in self._rules(ip, family):
                    self._delete_rule(ip, family, rule.get("iifname"), rule.get("fwmark"))
                ip.flush_routes(family=family, table=self._settings.route_table)
                ip.flush_routes(family=family, table=254, proto=_PROTOCOL)

        self._done(work)

    @_asked
    def path(self, address: Address) -> Way | None:
        """The route to ``address``, or None if there is none."""

        from sockmi.redirect.netlink import NetlinkError

        def work(ip: Any) -> Way | None:
            try:
                route = ip.route("get", dst=str(address), family=_FAMILY[address.version])[0]
            except NetlinkError:
                return None
            link = ip.get_links(route.get("oif"))[0]
            metrics = route.get("metrics")
            gateway, source = route.get("gateway"), route.get("prefsrc")
            return Way(
                route["type"],
                link.get("ifname"),
                link["ifi_type"],
                ip_address(gateway) if gateway else None,
                ip_address(source) if source else None,
                (metrics.get("mtu") if metrics else None) or link.get("mtu"),
            )

        return self._done(work)

    @_asked
    def warm(self, address: Address, device: str) -> None:
        """Have the kernel resolve the link-layer address now, so that no packet waits for it later."""

        def work(ip: Any) -> None:
            index = ip.link_lookup(ifname=device)[0]
            _unless(
                (errno.EEXIST,), ip.neigh, "add", dst=str(address), ifindex=index, state=0, flags=_NTF_USE
            )

        self._done(work)

    @_asked
    def lock_mtu(self, address: Address, mtu_bytes: int, path: Way) -> None:
        """A host route whose MTU also binds packets that are only forwarded to ``address``."""

        def work(ip: Any) -> None:
            index = ip.link_lookup(ifname=path.device)[0]
            via = {"gateway": str(path.gateway)} if path.gateway else {}
            ip.route(
                "replace",
                family=_FAMILY[address.version],
                dst=f"{address}/{address.max_prefixlen}",
                oif=index,
                proto=_PROTOCOL,
                metrics={"mtu": mtu_bytes, "lock": _RTAX_LOCK_MTU},
                **via,
            )

        self._done(work)

    @_asked
    def held(self, address: Address) -> Held | None:
        """Where this host has ``address``, or None."""

        def work(ip: Any) -> Held | None:
            found = _address_message(ip, address)
            if found is None:
                return None
            index, length = found["index"], found["prefixlen"]
            family = _FAMILY[address.version]
            others = [m for m in ip.get_addr(family=family, index=index) if m.get("address") != str(address)]
            routable = [m for m in others if m["scope"] == 0]
            secondary = bool(found["flags"] & 1)
            device = ip.get_links(index)[0].get("ifname")
            promotes = any(
                read_sysctl(f"net/ipv4/conf/{name}/promote_secondaries") for name in ("all", device)
            )
            dependents = (
                address.version == 4
                and not secondary
                and not promotes
                and any(m["flags"] & 1 and m["prefixlen"] == length for m in others)
            )
            return Held(address, device, length, not routable, dependents)

        return self._done(work)

    @_asked
    def add_address(self, address: Address, device: str, prefix_length: int) -> None:
        """Add an alias, usable at once (no duplicate address detection); present is no error."""

        def work(ip: Any) -> None:
            if _address_message(ip, address) is not None:
                return
            index = ip.link_lookup(ifname=device)[0]
            flags = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
            _unless(
                (errno.EEXIST,),
                ip.addr,
                "add",
                index=index,
                address=str(address),
                prefixlen=prefix_length,
                **flags,
            )

        self._done(work)

    @_asked
    def remove_address(self, address: Address) -> None:
        """Remove an address; absent is no error."""

        def work(ip: Any) -> None:
            found = _address_message(ip, address)
            if found is not None:
                ip.addr("del", index=found["index"], address=str(address), prefixlen=found["prefixlen"])

        self._done(work)

    @_asked
    def hardware_address(self, device: str) -> bytes:
        """MAC of a device."""

        def work(ip: Any) -> bytes:
            found = ip.link_lookup(ifname=device)
            if not found:
                raise OSError(errno.ENODEV, f"no device {device}; see `ip link`")
            text = ip.get_links(found[0])[0].get("address") or ""
            return bytes.fromhex(text.replace(":", ""))

        return self._done(work)

    @_asked
    def addresses(self) -> frozenset[Address]:
        """All addresses of this host."""

        def work(ip: Any) -> frozenset[Address]:
            return frozenset(ip_address(one.get("local") or one.get("address")) for one in ip.get_addr())

        return self._done(work)


def _address_message(ip: Any, address: Address) -> Any:
    for message in ip.get_addr(family=_FAMILY[address.version]):
        if ip_address(message.get("local") or message.get("address")) == address:
            return message
    return None
