# SPDX-License-Identifier: MIT
"""The harness's command line."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from guests import keeper
from guests.chroot import host_suite
from guests.dkms import built
from guests.errors import HarnessError
from guests.guest import Plan
from guests.image import Image
from guests.kernels import DEBIAN_KERNELS, DebianKernel
from guests.monitor import ask
from guests.paths import PROJECT
from guests.uml.kernel import UML_6_1, UML_6_1_DEBUG, UmlKernel
from guests.uml.run import Inside, run_inside
from guests.work import say

UML_KERNELS = {kernel.name: kernel for kernel in (UML_6_1_DEBUG, UML_6_1)}
KERNELS: dict[str, UmlKernel | DebianKernel] = {**UML_KERNELS, **DEBIAN_KERNELS}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m guests", description="Kernels to try the module in.")
    kinds = parser.add_subparsers(dest="kind", required=True)

    uml = kinds.add_parser(
        "uml",
        help="run a command inside a User-Mode-Linux kernel with KASAN, lockdep and kmemleak",
        description="Runs COMMAND with the host's root as an overlay (writes are lost, but for $SOCKMI_OUT), "
        "the module loaded and named by $SOCKMI_KO. Exit code: the command's; 1 if the kernel complained or "
        "the module lost memory or would not go; 124 when the time was up; 3 when the harness failed.",
    )
    uml.add_argument("--kernel", choices=UML_KERNELS, default="uml-6.1-debug")
    uml.add_argument("--module", type=Path, metavar="DIR", help="another module's source than kmod/")
    uml.add_argument("--no-module", action="store_true", help="build and load none")
    uml.add_argument(
        "--no-load", action="store_true", help="build the module, but leave loading to the command"
    )
    uml.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="of the module")
    uml.add_argument("--keep-loaded", action="store_true", help="do not try to unload the module afterwards")
    uml.add_argument("--no-leaks", action="store_true", help="do not look for lost memory (saves 6 s)")
    uml.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="for everything [120]")
    uml.add_argument("--memory", type=int, default=1024, metavar="MIB")
    uml.add_argument(
        "--boot", action="append", default=[], metavar="WORD", help="for the kernel's command line"
    )
    uml.add_argument(
        "--allow", action="append", default=[], metavar="PATTERN", help="a complaint that is expected"
    )
    uml.add_argument(
        "--save", type=Path, metavar="DIR", help="copy what the command left in $SOCKMI_OUT there"
    )
    uml.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND...")
    uml.set_defaults(do=_uml)

    module = kinds.add_parser("module", help="build the module for a kernel; prints the path of the .ko")
    module.add_argument("--kernel", choices=KERNELS, required=True)
    module.add_argument("--module", type=Path, metavar="DIR", default=PROJECT / "kmod")
    module.add_argument("--strict", action="store_true", help="anew, and with W=1 a warning is an error")
    module.add_argument("--to", type=Path, metavar="DIR", help="copy it there")
    module.set_defaults(do=_module)

    dkms = kinds.add_parser(
        "dkms", help="build it as a guest's DKMS would; prints the path of an archive for the guest's root"
    )
    dkms.add_argument("--kernel", choices=DEBIAN_KERNELS, required=True)
    dkms.add_argument("--module", type=Path, metavar="DIR", default=PROJECT / "kmod")
    dkms.set_defaults(do=_dkms)

    prepare = kinds.add_parser(
        "prepare", help="fetch and build what the tests need, so that they start at once"
    )
    prepare.add_argument("--kernel", choices=KERNELS, action="append", default=[], help="[6.1]")
    prepare.set_defaults(do=_prepare)

    up = kinds.add_parser("up", help="start guests that stay until `down`; describes them in DIR/guests.json")
    up.add_argument("folder", type=Path, metavar="DIR")
    up.add_argument(
        "--guest", action="append", default=[], metavar="NAME=KERNEL[:SUITE[:KIND]]", required=True,
        help="KIND: " + "; ".join(f"{kind}, {text}" for kind, text in keeper.KINDS.items() if kind),
    )  # fmt: skip
    up.add_argument(
        "--user", action="append", default=[], metavar="GUEST=NAME",
        help="ssh comes to GUEST by an unprivileged user, who has sudo (a package), not by root",
    )  # fmt: skip
    up.add_argument("--memory", type=int, default=384, metavar="MIB")
    up.add_argument("--package", action="append", default=[], metavar="NAME", help="also in their root")
    up.add_argument("--quick", action="store_true", help="the quick init instead of systemd, for all of them")
    up.add_argument("--owner", type=int, default=0, metavar="PID", help="they end with this process, too")
    up.add_argument("--hours", type=float, default=2, help="after which they end by themselves [2]")
    up.set_defaults(do=_up)

    down = kinds.add_parser("down", help="end the guests of DIR")
    down.add_argument("folder", type=Path, metavar="DIR")
    down.set_defaults(do=_down)

    cable = kinds.add_parser("cable", help="pull or plug the cable between a guest of DIR and its segment")
    cable.add_argument("folder", type=Path, metavar="DIR")
    cable.add_argument("guest", metavar="NAME")
    cable.add_argument("state", choices=("pull", "plug"))
    cable.set_defaults(do=_cable)

    reboots = kinds.add_parser("reboots", help="have a guest of DIR boot anew when it reboots; else it ends")
    reboots.add_argument("folder", type=Path, metavar="DIR")
    reboots.add_argument("guest", metavar="NAME")
    reboots.set_defaults(do=_reboots)
    return parser


def _uml(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise HarnessError("no command given; for a look around: scripts/kmod-uml sh -c 'uname -a; lsmod'")
    inside = Inside(
        command,
        kernel=UML_KERNELS[options.kernel],
        insmod=not options.no_load,
        parameters=options.param,
        unload=not options.keep_loaded,
        leaks=not options.no_leaks,
        limit=options.limit,
        memory=options.memory,
        boot=options.boot,
        allowed=options.allow,
        save=options.save,
    )
    if options.no_module:
        inside.module = None
    elif options.module:
        inside.module = options.module
    outcome = run_inside(inside, stream=True)
    if outcome.good:
        say(f"good, in {outcome.seconds:.1f} s; kernel log: {outcome.log}")
        return 0
    say(outcome.tell())
    return outcome.code or 1


def _module(options: argparse.Namespace) -> int:
    made = KERNELS[options.kernel].module(options.module, strict=options.strict)
    if options.to:
        made = Path(shutil.copy(made, options.to))
    print(made)
    return 0


def _dkms(options: argparse.Namespace) -> int:
    print(built(DEBIAN_KERNELS[options.kernel], options.module.resolve()))
    return 0


def _prepare(options: argparse.Namespace) -> int:
    for name in options.kernel or ["6.1"]:
        kernel = KERNELS[name]
        if isinstance(kernel, UmlKernel):
            kernel.build()
        else:
            kernel.initrd()
            Image(host_suite()).make()
    return 0


def _up(options: argparse.Namespace) -> int:
    basis = Plan(memory=options.memory, systemd=not options.quick, packages=options.package)
    keeper.up(
        options.folder, wanted(options.guest, options.user), basis, keeper.Stay(options.hours, options.owner)
    )
    return 0


def wanted(guests: Sequence[str], users: Sequence[str]) -> list[keeper.Wanted]:
    """What ``--guest`` and ``--user``, each given any number of times, ask for."""
    found = {one.name: one for one in (guest(text, number) for number, text in enumerate(guests, 1))}
    for text in users:
        name, _unused, user = text.partition("=")
        if name not in found or not user:
            raise HarnessError(f"--user {text}: give GUEST=NAME; there are {', '.join(found)}")
        found[name] = replace(found[name], user=user)
    return list(found.values())


def guest(text: str, number: int) -> keeper.Wanted:
    """What ``--guest`` asks for."""
    name, _unused, rest = text.partition("=")
    kernel, suite, kind, *_unused = [*rest.split(":"), "", ""]
    if kernel not in DEBIAN_KERNELS:
        raise HarnessError(f"--guest {text}: no kernel {kernel!r}; there are {', '.join(DEBIAN_KERNELS)}")
    if kind not in keeper.KINDS:
        known = ", ".join(filter(None, keeper.KINDS))
        raise HarnessError(f"--guest {text}: no kind {kind!r}; there are {known}")
    suite = suite or DEBIAN_KERNELS[kernel].suite
    if kind == "dkms" and suite != DEBIAN_KERNELS[kernel].suite:
        raise HarnessError(f"--guest {text}: {suite} has no headers of {kernel}, which dkms needs")
    return keeper.Wanted(name, number, kernel, suite, kind)


def _monitor(options: argparse.Namespace) -> Path:
    known = {one["name"]: one for one in keeper.machines(options.folder)}
    if options.guest not in known:
        raise HarnessError(f"{options.folder} has no guest {options.guest}; there are {', '.join(known)}")
    return Path(known[options.guest]["monitor"])


def _cable(options: argparse.Namespace) -> int:
    ask(_monitor(options), "set_link", name="n0", up=options.state == "plug")
    return 0


def _reboots(options: argparse.Namespace) -> int:
    # What it has written stays: it is QEMU's as long as that runs.
    ask(_monitor(options), "set-action", reboot="reset")
    return 0


def _down(options: argparse.Namespace) -> int:
    keeper.down(options.folder)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Do what ``arguments`` say; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.do(options))
    except HarnessError as error:
        say(str(error))
        return 3
