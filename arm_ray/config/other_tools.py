"""Keys of other merging tools, and what they are called here.

The vocabulary is that of mergekit's configurations and of PEFT's `add_weighted_adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_BASE = "`base`"
_CANDIDATES = "`candidates`, a list of directories"
_DENSITY = (
    "`method.ties.keep`, `method.breadcrumbs.keep`, `method.sce.select`, or 1 - "
    "`method.dare.drop_rate` and 1 - `method.della.drop_rate`"
)
_WEIGHTS = (
    "`method.coefficient` for all checkpoints together, or, of each, `method.average.weights` with "
    "`method.operator: average` and `method.average.kind: weighted`"
)
_DTYPE = "`precision.storage_dtype`, of the model that is written"
_TOKENIZER = "`tokenizer`: auto, base or last_candidate"
_COEFFICIENT = "`method.coefficient`"
_OPERATOR = "`method.operator`"
_T = "`method.slerp.t` or `method.nearswap.t`, or `method.coefficient` for task_arithmetic"
# At the top of a merge.
_TOP: Mapping[str, str] = {
    "merge_method": _OPERATOR,
    "base_model": _BASE,
    "models": _CANDIDATES,
    "slices": _CANDIDATES,
    "sources": _CANDIDATES,
    "checkpoints": _CANDIDATES,
    "parameters": "the section `method`, with one section for each operator",
    "dtype": _DTYPE,
    "out_dtype": _DTYPE,
    "tokenizer_source": _TOKENIZER,
    "out_path": "`output`",
    "output_dir": "`output`",
    "dataset": "`calibration.path`",
}
# In the section `method`.
_METHOD: Mapping[str, str] = {
    "name": _OPERATOR,
    "type": _OPERATOR,
    "merge_method": _OPERATOR,
    "combination_type": _OPERATOR,
}
# At either place, and in the sections of operators.
_NUMBERS: Mapping[str, str] = {
    "weight": _WEIGHTS,
    "weights": _WEIGHTS,
    "lambda": _COEFFICIENT,
    "lambda_": _COEFFICIENT,
    "alpha": _COEFFICIENT,
    "scale": _COEFFICIENT,
    "scaling": _COEFFICIENT,
    "scaling_coefficient": _COEFFICIENT,
    "density": _DENSITY,
    "densities": _DENSITY,
    "t": _T,
    "normalize": "`method.task_arithmetic.reduce`: mean or sum",
    "rescale": "`method.dare.rescale`: exact, l1 or none",
    "majority_sign_method": "`method.ties.zero_sign`, for entries that cancel exactly",
    "select_topk": "`method.sce.select`",
    "random_seed": "`method.dare.seed` or `method.della.seed`",
}
# In the section of one operator.
_SECTIONS: Mapping[str, Mapping[str, str]] = {
    "method.ties": {"density": "`method.ties.keep`"},
    "method.dare": {"density": "1 - density is `method.dare.drop_rate`"},
    "method.della": {"density": "1 - density is `method.della.drop_rate`"},
    "method.breadcrumbs": {
        "density": "`method.breadcrumbs.keep`",
        "gamma": "`method.breadcrumbs.largest`",
    },
    "method.sce": {"density": "`method.sce.select`"},
    "method.average": {"weight": "`method.average.weights`, one for each checkpoint"},
}
KEYS = frozenset((*_TOP, *_METHOD, *_NUMBERS, *(key for s in _SECTIONS.values() for key in s)))


def translated(parents: Sequence[str], name: str, *, is_merge: bool) -> str:
    """What a key of another tool is called here; empty: it is none, or of no use there.

    Args:
        parents: Sections that it is in, from the outermost.
        name: The key.
        is_merge: Whether the whole is the configuration of a merge.
    """
    if "method" in parents:
        section = _SECTIONS.get(".".join(parents[-2:]), {})
        own = _METHOD if parents[-1] == "method" else {}
        found = section.get(name) or own.get(name) or _NUMBERS.get(name)
    elif is_merge and not parents:
        found = _TOP.get(name) or _NUMBERS.get(name)
    else:
        found = None
    if not found:
        return ""
    return f"here it is {found}; `arm-ray config KEY` says what that takes"
