"""Shared fixtures: one tiny model per case and process, and a BlockModel around it."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from shared_models import FINE_TUNED, shared_model
from tiny_models import ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer

from blockrag.model.block_model import BlockModel
from blockrag.stores import MemoryStore

# Who runs the tests in the background of a shell has interrupts ignored; the processes of tests must not inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long it takes to draw and try examples is the machine's affair: it may be busy with other things.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# More threads than cores only adds noise to tests that run beside each other.
torch.set_num_threads(1)


@pytest.fixture
def make_model() -> Callable[..., BlockModel]:
    """Build a BlockModel around a tiny model: its own memory store, float32 at rest, every prompt composed anew."""

    def make(case: ModelCase | str = "llama", **arguments: Any) -> BlockModel:
        model = shared_model(case) if isinstance(case, str) else tiny_model(case)
        arguments.setdefault("facts", FINE_TUNED)
        arguments.setdefault("precision", "float32")
        arguments.setdefault("store", MemoryStore())
        arguments.setdefault("kept_bytes", 0)
        return BlockModel(model, plain_tokenizer(), **arguments)

    return make
