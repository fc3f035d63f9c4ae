"""What is large is imported without what nobody needs, and no process misses anything for it."""

from __future__ import annotations

import gc
import importlib.util
import os
import pickle
import subprocess
import sys

import pytest

from arm_ray.model.imports import OWN_PROCESS, collection_paused, not_installed
from arm_ray.model.layout import model_layout
from tests.builders.models import tiny_model

# What an actor does: it is sent a layout and builds the model. It says what was imported for that,
# and others find all there is.
_PROGRAM = """
import gc, pickle, sys
layout = pickle.load(sys.stdin.buffer)
from arm_ray.model.architecture import architecture_of
found = architecture_of(layout.config)
print(found.num_layers, *(name in sys.modules for name in ("sklearn", "scipy")), gc.isenabled())
import scipy.stats
"""


def test_a_process_of_its_own_does_not_import_what_no_decoder_needs() -> None:
    sent = pickle.dumps(model_layout(tiny_model("qwen2.5", seed=0).config))
    printed = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=os.environ | OWN_PROCESS,
        input=sent,
        capture_output=True,
        check=True,
    ).stdout
    assert printed.split() == [b"3", b"False", b"False", b"True"]


def test_a_hidden_package_is_not_found_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with not_installed(("this",)):
        assert importlib.util.find_spec("this") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("this")
    assert importlib.util.find_spec("this") is not None


def test_what_is_imported_already_stays() -> None:
    with not_installed(("json", "sys")):
        assert sys.modules["json"] is not None


def test_collection_goes_on_after_a_failure() -> None:
    def fails() -> None:
        with collection_paused():
            assert not gc.isenabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert gc.isenabled()
