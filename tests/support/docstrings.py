"""Real text that lies on every machine: the docstrings of Python's standard library, as a CSV of text and module group."""

from __future__ import annotations

import ast
import csv
import re
import sysconfig
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

GROUPS: dict[str, tuple[str, ...]] = {
    "concurrency": ("asyncio", "concurrent", "multiprocessing", "queue", "sched", "selectors", "subprocess", "threading"),
    "files": (
        *("_pyio", "fileinput", "fnmatch", "genericpath", "glob", "gzip", "lzma", "bz2", "mimetypes", "netrc", "ntpath", "os"),
        *("pathlib", "posixpath", "shelve", "shutil", "stat", "tarfile", "tempfile", "zipfile", "zipapp", "filecmp", "linecache"),
    ),
    "internet": (
        *("cgi", "ftplib", "html", "http", "imaplib", "ipaddress", "nntplib", "poplib", "smtplib", "socket", "socketserver"),
        *("ssl", "telnetlib", "urllib", "webbrowser", "wsgiref", "xmlrpc", "uuid"),
    ),
    "language": (
        *(
            "_collections_abc",
            "_weakrefset",
            "abc",
            "ast",
            "code",
            "codeop",
            "contextlib",
            "copy",
            "copyreg",
            "dataclasses",
            "dis",
        ),
        *(
            "enum",
            "functools",
            "importlib",
            "inspect",
            "operator",
            "opcode",
            "pickle",
            "pickletools",
            "pkgutil",
            "pydoc",
            "runpy",
        ),
        *("symtable", "tokenize", "types", "typing", "weakref", "zipimport", "collections"),
    ),
    "mail": ("email", "mailbox", "mailcap", "quopri", "base64"),
    "numbers": (
        *("_pydecimal", "_pydatetime", "bisect", "calendar", "colorsys", "datetime", "decimal", "fractions", "hashlib", "heapq"),
        *("hmac", "numbers", "random", "secrets", "statistics", "_strptime", "zoneinfo", "graphlib"),
    ),
    "testing": (
        *("argparse", "bdb", "cmd", "cProfile", "doctest", "logging", "optparse", "pdb", "profile", "pstats", "timeit", "trace"),
        *("traceback", "tracemalloc", "unittest", "warnings"),
    ),
    "text": (
        *(
            "codecs",
            "configparser",
            "csv",
            "difflib",
            "gettext",
            "json",
            "locale",
            "plistlib",
            "pprint",
            "re",
            "reprlib",
            "shlex",
        ),
        *("sre_parse", "string", "textwrap", "tomllib", "xml", "encodings", "stringprep"),
    ),
}
SHORTEST, LONGEST = 20, 300
MOST_A_GROUP = 450


def rows() -> list[tuple[str, str]]:
    """Return (text, group) in a fixed order, no text twice."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    for group, modules in sorted(GROUPS.items()):
        fresh = (text for module in sorted(modules) for text in _module(root, module) if text not in seen)
        for text in islice(fresh, MOST_A_GROUP):
            seen.add(text)
            found.append((text, group))
    return found


def write_csv(path: Path) -> int:
    """Write the columns `docstring` and `group`, and return the number of rows."""
    everything = rows()
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["docstring", "group"])
        writer.writerows(everything)
    return len(everything)


def _module(root: Path, name: str) -> Iterator[str]:
    module, package = root / f"{name}.py", root / name
    paths = [module] if module.is_file() else sorted(package.rglob("*.py")) if package.is_dir() else []
    for path in paths:
        if {"test", "tests"} & set(path.relative_to(root).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = re.sub(r"\s+", " ", ast.get_docstring(node) or "").strip()
                if len(text) >= SHORTEST:
                    yield text[:LONGEST]
