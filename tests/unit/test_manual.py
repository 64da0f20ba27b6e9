# SPDX-License-Identifier: MIT
"""The manual tells what the code does: man pages, completions, operations, security, versions."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
import yaml
from pydantic.fields import FieldInfo

from sockmi.api import ADMINISTRATOR_OPS
from sockmi.cli.arguments import EPILOG, build_parser
from sockmi.config import Config, Strict
from sockmi.metrics import Metrics
from sockmi.version import VERSION

PROJECT = Path(__file__).resolve().parents[2]
DOCS = PROJECT / "docs"
MAN = DOCS / "man"


def _plain(page: str) -> str:
    """A man page without the escapes of roff."""
    text = (MAN / page).read_text()
    return text.replace(r"\-", "-").replace(r"\&", "").replace(r"\(bu", "").replace(r"\e", "\\")


# -- sockmi.yml(5)


def _annotations(annotation: Any, metadata: list[Any]) -> tuple[Any, list[Any]]:
    """The plain type and all constraints, through nested Annotated and unions with None."""
    if hasattr(annotation, "__metadata__"):
        inner, more = _annotations(get_args(annotation)[0], [])
        constraints = [*annotation.__metadata__, *more, *metadata]
        found: list[Any] = []
        for one in constraints:
            found += one.metadata if isinstance(one, FieldInfo) else [one]
        return inner, found
    options = [one for one in get_args(annotation) if one is not type(None)]
    if get_origin(annotation) is not tuple and len(options) == 1 and get_origin(annotation) is not Literal:
        return _annotations(options[0], metadata)
    return annotation, metadata


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return f"list of {_kind(_annotations(get_args(annotation)[0], [])[0])}"
    if set(get_args(annotation)) == {IPv4Address, IPv6Address}:
        return "address"
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    if annotation in names:
        return names[annotation]
    return "path" if issubclass(annotation, Path) else "one of " + ", ".join(annotation)


def _number(value: float) -> str:
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _default(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return _number(value) if isinstance(value, int | float) else str(value)


def described(name: str, field: FieldInfo) -> str:
    """What sockmi.yml(5) has to say of an option, in parentheses behind its name."""
    if name == "control_mode":
        return f"octal number, 0000 to 0777, default {field.default:04o}"
    annotation, metadata = _annotations(field.annotation, field.metadata)
    parts = [_kind(annotation)]
    for suffix, unit in (("_s", "seconds"), ("_bytes_max", "bytes")):
        if name.endswith(suffix):
            parts = [unit]
    bounds: dict[type, Any] = {type(one): one for one in metadata}
    least: Any = bounds.get(annotated_types.Ge) or bounds.get(annotated_types.Gt)
    most: Any = bounds.get(annotated_types.Le)
    if least is not None and most is not None:
        low = f"more than {least.gt}" if isinstance(least, annotated_types.Gt) else _number(least.ge)
        parts.append(f"{low} to {_number(most.le)}")
    if step := bounds.get(annotated_types.MultipleOf):
        parts.append(f"a multiple of {step.multiple_of}")
    parts.append(f"default {_default(field.get_default(call_default_factory=True))}")
    return ", ".join(parts)


def options(model: type[Strict], prefix: str = "") -> Iterator[tuple[str, str, FieldInfo]]:
    """Every option: the model's section, its name, its field."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if get_origin(inner) is tuple:
            inner = get_args(inner)[0]
        if isinstance(inner, type) and issubclass(inner, Strict):
            yield from options(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", name, field


def test_every_option_is_in_the_manual() -> None:
    text = _plain("sockmi.yml.5")
    said = dict(re.findall(r"^\.It Cm (\S+) Pq (.*)$", text, re.MULTILINE))
    wanted = {path: described(name, field) for path, name, field in options(Config)}
    assert said == wanted


def test_the_example_configuration_is_good() -> None:
    Config.load(PROJECT / "daemon/sockmi.example.yml")
    block = re.search(r"^\.Bd -literal.*?\n(.*?)^\.Ed", _plain("sockmi.yml.5"), re.MULTILINE | re.DOTALL)
    assert block
    Config.model_validate(yaml.safe_load(block[1]))


# -- sockmi(1), completions


def _commands() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    (action,) = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    return dict(action.choices)


def _words(parser: argparse.ArgumentParser) -> set[str]:
    """Options of a command, and the words that it takes in the place of an argument."""
    found: set[str] = set()
    for action in parser._actions:
        found |= {one for one in action.option_strings if one.startswith("--") and one != "--help"}
        if not action.option_strings and action.choices:
            found |= set(action.choices)
    return found


def test_every_command_and_option_is_in_the_manual() -> None:
    text = _plain("sockmi.1")
    sections = re.split(r"^\.Ss ", text, flags=re.MULTILINE)
    by_name = {section.split(None, 1)[0]: section for section in sections[1:]}
    for name, parser in _commands().items():
        assert name in by_name, name
        section = by_name[name] + (by_name["Selection"] if name in ("list", "drain") else "")
        for word in _words(parser) - {"--json", "--control"}:
            written = word.removeprefix("-")  # mdoc adds the first dash
            assert re.search(rf"(?<![\w-]){written}(?![\w-])", section), (name, word)
    for status in re.findall(r"^  (\d)  ", EPILOG, re.MULTILINE):
        assert re.search(rf"^\.It {status}$", text, re.MULTILINE), f"exit status {status}"


@pytest.mark.parametrize("name", ["sockmi.bash", "_sockmi"])
def test_every_command_and_option_is_completed(name: str) -> None:
    text = (PROJECT / "completions" / name).read_text()
    shared = dict(re.findall(r"\b(common|select|moving)=(.*)", text))
    for command, parser in _commands().items():
        match = re.search(rf"^\s*{command}\)(.*?);;", text, re.MULTILINE | re.DOTALL)
        assert match, command
        offered = match[1] + "".join(words for name, words in shared.items() if f"${name}" in match[1])
        wanted = _words(parser)
        assert set(re.findall(r"--[a-z-]+", offered)) - {"--help"} == {
            word for word in wanted if word.startswith("--")
        }, command
        assert {word for word in wanted if not word.startswith("--")} <= set(re.findall(r"\w+", offered))
        for action in parser._actions:
            if action.option_strings and action.choices:
                assert set(action.choices) <= set(re.findall(r"\w+", text)), (command, action.dest)
            if name == "_sockmi" and action.option_strings and action.nargs is None:
                assert re.search(rf"{action.option_strings[-1]}=\[", offered), "not with =, either"


def test_bash_completes() -> None:
    """For real: what a user gets after a few keys."""
    script = f"""
    source {PROJECT}/completions/sockmi.bash
    ask() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _sockmi; echo "${{COMPREPLY[*]}}"; }}
    sockmi() {{ [ "$*" = "groups --json" ] && printf ' "host": "b1",\n "host": "c1",\n'; }}
    ask sockmi dr; ask sockmi drain --uni; ask sockmi groups jo; ask sockmi import --kind li
    ask sockmi list re; ask sockmi history --outcome mo; ask sockmi export --to ""
    # What it gets of --to=, as "=" parts words, and if it does not.
    ask sockmi export --to =; ask sockmi export --to = b; ask sockmi export --to=c
    ask sockmi history --outcome=mo; ask sockmi --control = x.sock dr; ask sockmi --control=x.sock dr
    ask sockmi drain --rate = 5
    COMP_WORDS=(sockmid --config = {PROJECT}/READM); COMP_CWORD=3; _sockmid; echo "${{COMPREPLY[*]}}"
    """
    done = subprocess.run(["bash", "-c", script], text=True, capture_output=True, timeout=20, check=True)
    assert done.stdout.splitlines() == [
        *("drain", "--unit", "join", "listening", "redirects", "moved", "b1 c1"),
        *("b1 c1", "b1", "--to=c1", "--outcome=moved", "drain", "drain", ""),
        f"{PROJECT}/README.md",
    ]
    assert done.stderr == ""


def test_bash_finds_completions_by_the_commands_names() -> None:
    """It loads the file that is called as the command; the role links one for each."""
    text = (PROJECT / "completions/sockmi.bash").read_text()
    links = yaml.safe_load((PROJECT / "roles/sockmi/vars/main.yml").read_text())["__sockmi_links"]
    there = {Path(link).name for link in links if "bash-completion" in link}
    assert there == set(re.findall(r"^complete -F \w+ (\w+)$", text, re.MULTILINE)) == {"sockmi", "sockmid"}


def test_zsh_can_read_its_completions() -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed, so nothing here can check its syntax")
    script = PROJECT / "completions/_sockmi"
    done = subprocess.run(["zsh", "-n", script], text=True, capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# -- man pages as such

PAGES = sorted(MAN.glob("*.[0-9]"))


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_man_pages_are_clean(page: Path) -> None:
    if (alias := re.fullmatch(r"\.so man3/(\S+)\n", page.read_text())) is not None:
        assert (MAN / alias[1]).is_file()  # the other page, beside it once both are installed
        return
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed, so nothing here can format a man page")
    done = subprocess.run(
        # Not "break": where a prototype's lines break and how they fill is the formatter's affair.
        ["groff", "-ww", "-Wbreak", "-z", "-Tutf8", "-mandoc", page.name],
        cwd=MAN,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_pages_are_there() -> None:
    assert {"sockmi.1", "sockmid.8", "sockmi.yml.5", "sockmi.3"} <= {page.name for page in PAGES}


def test_sockmid_tells_its_options() -> None:
    """The manual page and both completions have every option of ``sockmid --help``."""
    command = [sys.executable, "-m", "sockmi.service", "--help"]
    said = subprocess.run(command, text=True, capture_output=True, timeout=60, check=True).stdout
    options = set(re.findall(r"--([a-z-]+)", said)) - {"help"}
    assert {"config", "check", "remove-redirects", "force", "version"} == options
    page = (MAN / "sockmid.8").read_text()
    assert set(re.findall(r"Fl -([a-z-]+)", page)) == options
    zsh, bash = ((PROJECT / "completions" / name).read_text() for name in ("_sockmid", "sockmi.bash"))
    assert all(re.search(rf"'--{option}=?\[", zsh) for option in options)
    words = re.findall(r'words="(--config [^"]*)"', bash)[-1].split()
    assert set(words) == {f"--{option}" for option in {*options, "help"}}


# -- docs


def test_scripts_are_run_as_it_is_said() -> None:
    """By themselves, or by the program that reads them."""
    said = "".join(
        path.read_text()
        for path in (*DOCS.glob("*.md"), PROJECT / "README.md", PROJECT / "molecule/README.md")
    )
    said += "".join(path.read_text() for path in (PROJECT / "roles/sockmi/files").glob("*.py"))
    scripts = {PROJECT / name for name in re.findall(r"[`(](scripts/\w+) ", said)}
    assert scripts
    assert {script for script in scripts if not os.access(script, os.X_OK)} == set()


def test_every_metric_is_explained() -> None:
    text = (DOCS / "operations.md").read_text()
    said = dict(re.findall(r"^\| `(sockmi_\w+)` \| ([^|]*) \|", text, re.MULTILINE))
    wanted = {
        metric._name + ("_total" if metric._type == "counter" else ""): ", ".join(metric._labelnames)
        for metric in vars(Metrics()).values()
        if hasattr(metric, "_labelnames")
    }
    assert {name: labels.strip("` ").replace("`", "") for name, labels in said.items()} == wanted


def test_every_capability_is_explained() -> None:
    unit = (PROJECT / "daemon/systemd/sockmid.service").read_text()
    bounding, ambient = re.findall(
        r"^(?:CapabilityBoundingSet|AmbientCapabilities)=(.*)$", unit, re.MULTILINE
    )
    assert bounding == ambient
    profile = (PROJECT / "daemon/apparmor/sockmid").read_text()
    confined = re.findall(r"^  capability (\w+),$", profile, re.MULTILINE)
    assert sorted(f"CAP_{name.upper()}" for name in confined) == sorted(bounding.split())
    said = re.findall(r"^\| `(CAP_\w+)` \|", (DOCS / "security.md").read_text(), re.MULTILINE)
    assert set(said) == set(bounding.split())
    assert len(said) == len(set(said))


def test_administrators_requests_are_named() -> None:
    text = (DOCS / "security.md").read_text()
    assert all(f"`{op}`" in text for op in ADMINISTRATOR_OPS)


def test_every_path_of_the_map_exists() -> None:
    """docs/architecture.md names the parts of the repository; none is missing, none is forgotten."""
    text = (DOCS / "architecture.md").read_text()
    block = re.search(r"^## Files\n.*?^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block
    named = set()
    for line in block[1].splitlines():
        path = line.split("  ")[0].strip()
        if path:
            assert (PROJECT / path).exists(), path
            named.add(path.rstrip("/"))
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.splitlines()):
        file = Path(name)
        assert {str(one) for one in (file, *file.parents)} & named or file.name.startswith("."), name
        # These folders have one line for each of their parts.
        if file.parts[:2] == ("daemon", "sockmi") and file.parts[2].endswith(".py"):
            assert name in named, name
        elif file.parts[:2] == ("daemon", "sockmi"):
            assert str(Path(*file.parts[:3])) in named, name
        elif file.parent == Path("kmod") and file.suffix == ".c":
            assert name in named, name


def test_links_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


# -- versions, changelog


def test_one_version() -> None:
    project = tomllib.loads((PROJECT / "daemon/pyproject.toml").read_text())["project"]
    collection = yaml.safe_load((PROJECT / "galaxy.yml").read_text())
    makefile = re.search(
        r"^VERSION := (.*)$", (PROJECT / "daemon/libsockmi/Makefile").read_text(), re.MULTILINE
    )
    assert makefile
    assert VERSION == project["version"] == collection["version"] == makefile[1]


def test_changelog_fragments() -> None:
    """As antsibull-changelog wants them: known sections, lists of sentences."""
    config = yaml.safe_load((PROJECT / "changelogs/config.yaml").read_text())
    sections = {name for name, _unused in config["sections"]} | {"release_summary", "trivial"}
    fragments = list((PROJECT / config["notesdir"].join(["changelogs/", ""])).glob("*.yml"))
    assert fragments
    for fragment in fragments:
        content = yaml.safe_load(fragment.read_text())
        assert set(content) <= sections, fragment
        for section, notes in content.items():
            assert isinstance(notes, str if section == "release_summary" else list), fragment
    assert (PROJECT / "changelogs/changelog.yaml").exists()
