"""Telemetry off; the demo model with a block store of its own for every test; the demo's passages as documents."""

import os

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
# Functions of tests may be named in serialised tools.
os.environ["HAYSTACK_DESERIALIZATION_ALLOWLIST"] = "test_tools"

from itertools import count

import pytest
from haystack import Document

from blockrag.demo import load_corpus

_STORES = count()


@pytest.fixture
def model_arguments():
    """Arguments of the demo model with a block store that no other test has seen."""
    return {"model": "demo", "store": f"memory://?max_bytes={(1 << 28) + next(_STORES)}"}


@pytest.fixture(scope="session")
def corpus():
    """The demo's passages as Haystack documents."""
    return [Document(id=one.id, content=one.text, meta={"title": one.title}) for one in load_corpus()]
