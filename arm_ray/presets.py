"""Named starting points for a configuration: `preset: paper/arm`.

A preset is a part of a configuration. What the user's file or an override says takes its place, key
by key. The presets are the rows of the ARM paper's tables. Table 1 has the baselines in their
streaming form, so `paper/streaming-ties` is its row TIES; `paper/ties` is one merge of the
candidates into the base.

"Open" below marks what the paper does not say. It is written out all the same, so that the resolved
configuration shows which choice a result rests on.
"""

from __future__ import annotations

import copy
from typing import Any

Content = dict[str, Any]


def merged(under: Content, over: Content) -> Content:
    """Content with the keys of `over` and, where it has none, those of `under`; neither changes.

    Sections are merged key by key. Lists and null are values like any other.
    """
    result = copy.deepcopy(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def _join(*parts: Content) -> Content:
    result: Content = {}
    for part in parts:
        result = merged(result, part)
    return result


def _schedule(anchored: int, iterations: int) -> Content:
    return {
        "schedule": {
            "initial": "base",
            "anchor_iterations": anchored,
            "window_size": 2,
            # Open: Eq. 1 is printed with n, the closed form in A.1 fits n - 1.
            "window_divisor": "n",
            "max_iterations": iterations,
            # Open: when the states count as still.
            "tolerance": 1.0e-4,
            # The paper's steps all have the length that its coefficient gives.
            "step": "fixed",
        }
    }


# A.2: three anchored rounds, then the window, six rounds at most. It says so of ARM. Open: whether
# the baselines of Table 1 have the same schedule; here they do.
_HYBRID = _schedule(3, 6)
_ANCHORING = _schedule(6, 6)
_WINDOW = _schedule(0, 6)
_SINGLE_TURN = _schedule(1, 1)

# A.2: 64 samples a step for all methods that use activations.
_BATCH: Content = {"calibration": {"batch_size": 64}}


def _method(operator: str, *parts: Content) -> Content:
    return {"method": _join({"operator": operator}, *parts)}


# A.2, for all methods that have a coefficient.
_LAMBDA: Content = {"coefficient": 0.7}
_MEAN: Content = {
    # As Eqs. 1 and 2 are printed. Open: whether every row has the mean and not the original's sum.
    "task_arithmetic": {"reduce": "mean"},
}
_ROTATION: Content = {
    "rotation": {
        "variant": "activation",
        # Open: the signs of singular vectors, and what counts as zero.
        "sign": "positive_diagonal",
        "rank_tolerance": 1.0e-6,
    },
}
_TIES: Content = {
    "ties": {
        # "top-k sparsity ratio 0.2". Open: whether 20 % are kept (as here) or masked; then 0.8.
        "keep": 0.2,
        # Open: the original's is global.
        "scope": "global",
        "zero_sign": "majority",
        "combine": "mean",
    },
}
_DARE: Content = {
    "dare": {
        "drop_rate": 0.9,
        "rescale": "exact",
        # Open: what merges the thinned task vectors, and the seed.
        "then": "task_arithmetic",
        "seed": 0,
    },
}
_AIM: Content = {
    "aim": {
        "omega": 0.4,
        # Open: which merge is relaxed; whose activations count after the first iteration.
        "on": "ties",
        "activations_of": "reference",
        "average": "sample",
        "tied": "relax",
    },
}
_ACM: Content = {
    "acm": {
        # Open, all three: 0.7 is what ACM's authors took for models of these kinds.
        "t": 0.7,
        "shift": "per_layer",
        "on": "task_arithmetic",
    },
}
# Timber and POME have no coefficient. Open: whether the 0.7 of A.2 was put before them.
_WHOLE: Content = {"coefficient": 1.0}
_TIMBER: Content = {
    "edit": "timber",
    # Open.
    "timber": {"gamma": 0.2, "epsilon": 1.0e-9},
}
_POME: Content = {
    "edit": "pome",
    # Open; and the scale is inferred, not read in the method's paper.
    "pome": {"rank_fraction": 0.5, "scale": "fro", "beta": 1.0, "tensors": "up_proj"},
}

_ARM = _join(_BATCH, _method("arm", _LAMBDA, _MEAN, _ROTATION))
_BASELINES: dict[str, Content] = {
    "task-arithmetic": _method("task_arithmetic", _LAMBDA, _MEAN),
    "ties": _method("ties", _LAMBDA, _TIES),
    "dare": _method("dare", _LAMBDA, _DARE, _MEAN),
    "aim": _join(_BATCH, _method("aim", _LAMBDA, _AIM, _TIES)),
    # No coefficient: finding it is what ACM does.
    "acm": _join(_BATCH, _method("acm", _ACM, _MEAN)),
}

PRESETS: dict[str, Content] = {
    # Tables 1, 3, 5, 6, 7, 8, 9; the hybrid of Table 11.
    "paper/arm": _join(_ARM, _HYBRID),
    # Table 11.
    "paper/arm-anchoring": _join(_ARM, _ANCHORING),
    "paper/arm-window": _join(_ARM, _WINDOW),
    # Table 12.
    "paper/arm-single-turn": _join(_ARM, _SINGLE_TURN),
    # Task Arithmetic's is Table 12; the paper has no numbers for the others.
    **{f"paper/{name}": _join(part, _SINGLE_TURN) for name, part in _BASELINES.items()},
    # Table 1; Task Arithmetic's also Tables 3, 5, 8, 9.
    **{f"paper/streaming-{name}": _join(part, _HYBRID) for name, part in _BASELINES.items()},
    # Tables 4 and 10: one candidate, a checkpoint after reinforcement learning.
    "paper/timber": _join(_method("task_arithmetic", _WHOLE, _MEAN, _TIMBER), _SINGLE_TURN),
    "paper/pome": _join(_method("task_arithmetic", _WHOLE, _MEAN, _POME), _SINGLE_TURN),
    "paper/arm-timber": _join(
        _BATCH, _method("arm", _WHOLE, _MEAN, _ROTATION, _TIMBER), _SINGLE_TURN
    ),
    "paper/arm-pome": _join(_BATCH, _method("arm", _WHOLE, _MEAN, _ROTATION, _POME), _SINGLE_TURN),
}
