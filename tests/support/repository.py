"""Paths of the checkout that the tests read."""

from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
TESTS = TOP / "tests"
PUBLISHED = TOP / "results" / "published"
