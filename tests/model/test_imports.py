"""What is large is imported without what nobody needs, and no process misses anything for it."""

from __future__ import annotations

import gc
import importlib.util
import pickle
import subprocess
import sys

import pytest

from arm_ray.model.imports import collection_paused, not_installed
from arm_ray.model.layout import model_layout
from tests.builders.models import tiny_model

# What an actor does: it is sent a layout and builds the model. It says what was imported for that,
# and others find all there is.
_PROGRAM = """
import gc, pickle, sys
from arm_ray.model.imports import set_own_process
set_own_process()
layout = pickle.load(sys.stdin.buffer)
assert layout.num_layers == 3 and "transformers" not in sys.modules
from arm_ray.model.architecture import architecture_of
found = architecture_of(layout.config)
unused = ("sklearn", "scipy", "torch._dynamo", "torch.distributed.tensor")
print(found.num_layers, *(name in sys.modules for name in unused), gc.isenabled())
import scipy.stats
import torch
from torch.distributed.tensor import DTensor
from transformers import masking_utils
with masking_utils.TransformGetItemToIndex() as index:
    print(type(index).__module__)
compiled = torch.compile(lambda x: x + 1, backend="eager")
print(int(compiled(torch.tensor(1))), torch.distributed.is_available(), bool(torch._dynamo))
"""


def words_of(program: str) -> list[bytes]:
    """What a program prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return done.stdout.split()


def test_a_process_of_its_own_does_not_import_what_no_decoder_needs() -> None:
    sent = pickle.dumps(model_layout(tiny_model("qwen2.5", seed=0).config))
    printed = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=sent,
        capture_output=True,
        check=True,
    ).stdout
    lines = printed.decode().splitlines()
    assert lines[0].split() == ["3", *["False"] * 4, "True"]
    # What needs them finds them, the real ones.
    assert lines[2] == "2 True True"


def test_a_layout_that_was_sent_is_the_same() -> None:
    layout = model_layout(tiny_model("qwen2.5", seed=0).config)
    sent = pickle.dumps(layout)
    for found in (pickle.loads(sent), pickle.loads(pickle.dumps(pickle.loads(sent)))):
        assert found.shapes == layout.shapes
        assert found.config.to_dict() == layout.config.to_dict()
        assert not hasattr(found, "other")
    assert pickle.loads(sent).text_config.hidden_size == layout.text_config.hidden_size


def test_tensorboard_is_imported_without_what_is_for_amazon_s_storage() -> None:
    program = (
        "import sys\n"
        "from arm_ray.model import imports\n"
        "imports.set_own_process()\n"
        "imports.import_tensorboard()\n"
        "from torch.utils.tensorboard import SummaryWriter\n"
        "print('boto3' in sys.modules, 'botocore' in sys.modules)\n"
    )
    assert words_of(program) == [b"False", b"False"]


def test_a_version_that_needs_more_of_the_compiler_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was imported in part is imported anew."""
    program = (
        "import sys\n"
        "from arm_ray.model import imports\n"
        "imports.set_own_process()\n"
        "def fails():\n"
        "    imports._import = whole\n"
        "    import transformers.modeling_layers\n"
        "    raise AttributeError('the compiler has no such thing')\n"
        "whole, imports._import = imports._import, fails\n"
        "imports.import_model_classes()\n"
        "import transformers\n"
        "print('torch._dynamo' in sys.modules, transformers.AutoModelForCausalLM.__name__)\n"
    )
    assert words_of(program) == [b"True", b"AutoModelForCausalLM"]


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
