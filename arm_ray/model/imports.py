"""Importing what is large: torch, Ray and transformers' model classes take most of a short merge.

Where they are installed, transformers imports scikit-learn for one way of generating and SciPy for
the losses of object detection. Together they take as long to import as all the rest.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import threading
from collections.abc import Iterator

# In the environment of a process that runs nothing but arm_ray.
OWN_PROCESS = {"ARM_RAY_OWN_PROCESS": "1"}
_UNUSED = ("sklearn", "scipy")
_LOCK = threading.Lock()


def import_model_classes() -> None:
    """Import what all model classes of transformers share; afterwards a class takes no time.

    Only in a process of arm_ray's own (`OWN_PROCESS`): transformers keeps for the life of a process
    which packages it has found, and others would miss them.
    """
    with _LOCK:
        is_own = OWN_PROCESS.items() <= os.environ.items()
        if "transformers.modeling_utils" in sys.modules or not is_own:
            return
        with not_installed(_UNUSED), collection_paused():
            importlib.import_module("transformers.models.auto.modeling_auto")
            importlib.import_module("transformers.modeling_utils")


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Import without looking for garbage, of which imports leave none: a quarter of their time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def not_installed(packages: tuple[str, ...]) -> Iterator[None]:
    """Let imports, and questions whether they are installed, find no such packages.

    Those that are imported already stay.

    Args:
        packages: Their import names.
    """
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        # Python's own way to say that a module is not there: `find_spec` gives None for it.
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
