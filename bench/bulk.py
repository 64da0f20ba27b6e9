from __future__ import annotations
from bench.report import Report
from bench.site import Site
def run(site: Site, report: Report, *, quick: bool) -> None: ...
