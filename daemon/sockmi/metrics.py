# SPDX-License-Identifier: MIT
"""Prometheus metrics of the daemon, served over HTTP on a loopback address."""

from __future__ import annotations

import socket
from typing import Any

from sockmi.unread import unread

with unread("prometheus_client"):
    from prometheus_client.metrics import Counter, Gauge, Histogram
    from prometheus_client.registry import CollectorRegistry

_FETCHING = "BaseHandler", "build_opener", "HTTPHandler", "HTTPRedirectHandler", "HTTPSHandler", "Request"


class Metrics:
    """What an operator watches; names follow Prometheus' conventions (base units, ``_total``)."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.migrations = Counter(
            "sockmi_migrations",
            "Migrations that ended, by side (export, import), outcome and this host's engine",
            ["direction", "outcome", "engine"],
            registry=self._registry,
        )
        self.engine = Gauge(
            "sockmi_engine", "1: the engine that this host uses", ["engine"], registry=self._registry
        )
        self.refusals = Counter(
            "sockmi_refusals", "Sockets that were not moved, by code", ["code"], registry=self._registry
        )
        self.freeze = Histogram(
            "sockmi_freeze_seconds",
            "From the freeze of a chunk to its importer's ACTIVE, as the exporter saw it",
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
            registry=self._registry,
        )
        self.image_bytes = Counter(
            "sockmi_image_bytes", "Bytes of images shipped, by side", ["direction"], registry=self._registry
        )
        self.redirects = Gauge(
            "sockmi_redirects", "Redirects in force, by side", ["direction"], registry=self._registry
        )
        self.import_list = Gauge(
            "sockmi_import_list_length",
            "Sockets that wait for an application",
            ["kind"],
            registry=self._registry,
        )
        self.oldest = Gauge(
            "sockmi_import_list_oldest_seconds",
            "How long the oldest of them has waited, since the daemon's start; 0: there is none",
            ["kind"],
            registry=self._registry,
        )
        self.waiting = Gauge(
            "sockmi_import_requests_waiting",
            "Import requests that wait for a socket",
            registry=self._registry,
        )
        self.members = Gauge(
            "sockmi_group_members", "Other daemons heard", ["group"], registry=self._registry
        )
        self.stuck = Gauge(
            "sockmi_stuck_inspectors",
            "Looks at sockets that were given up, as an owner keeps one locked, and have not ended yet",
            registry=self._registry,
        )
        self._server: Any = None

    def serve(self, address: str, port: int) -> None:
        """Serve on ``http://address:port/metrics`` from a thread; raise OSError if the port is taken."""
        # Of the names of 2,231 characters, and of fetching pages, the server needs nothing.
        with unread("html"), unread("urllib.request", **dict.fromkeys(_FETCHING, object)):
            from prometheus_client.exposition import start_http_server

        try:
            self._server, _unused = start_http_server(port, address, registry=self._registry)
        except OSError as error:
            where = f"{address} port {port}"
            message = f"metrics at {where}: {error.strerror}; choose another metrics_port, or 0 for none"
            raise OSError(error.errno, message) from error

    def close(self) -> None:
        """The inverse of ``serve``."""
        if self._server is not None:
            # Its thread looks twice a second whether it is to end, or when something comes.
            self._server.socket.shutdown(socket.SHUT_RDWR)
            self._server.shutdown()
            self._server.server_close()
            self._server = None
