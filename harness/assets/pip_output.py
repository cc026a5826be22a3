"""Causes of failures of pip, read from its output."""

from __future__ import annotations

import re

_UNREACHABLE = re.compile(
    r"Retrying \(Retry|ConnectionError|Failed to resolve|name resolution|[Tt]imed out|ProxyError|SSLError|"
    r"Could not fetch URL|HTTP error 5\d\d|HTTPError: 5\d\d"
)
_VERSIONS = re.compile(r"Could not find a version that satisfies the requirement (.+?) \(from versions: (.*?)\)\n")
_HASH = re.compile(r"Got\s+([0-9a-f]{64})")


def reaches_no_index(output: str) -> bool:
    """Return whether pip could not read a package index."""
    return _UNREACHABLE.search(output) is not None


def wrong_hash(output: str) -> str:
    """Return the SHA-256 of a file whose hash is not the required one. If pip reports no wrong hash, return ""."""
    found = _HASH.search(output)
    return found[1] if found else ""


def offered_versions(output: str) -> tuple[str, list[str]] | None:
    """Return a requirement that no version satisfies, and the versions that pip found. None: pip reports no such failure."""
    found = _VERSIONS.search(f"{output}\n")
    if found is None:
        return None
    return found[1], [] if found[2] == "none" else found[2].split(", ")


def conflict(output: str) -> list[str]:
    """Return pip's lines about requirements that exclude each other. If there are none, return an empty list."""
    if "ResolutionImpossible" not in output:
        return []
    _, _, rest = output.partition("The conflict is caused by:")
    lines = [line.strip() for line in rest.splitlines()]
    return [line for line in lines[1:] if line][: lines[1:].index("") if "" in lines[1:] else None]


def reason(output: str) -> str:
    """Return pip's own error lines, joined into one line. If there are none, return the last line of the output."""
    errors = [line for line in output.splitlines() if line.startswith("ERROR:") and line != "ERROR: Exception:"]
    return " / ".join(errors or output.splitlines()[-1:]) or "no output"
