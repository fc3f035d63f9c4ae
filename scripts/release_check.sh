#!/usr/bin/env bash
# Builds the wheel and the source archive, installs the wheel into an empty environment of each
# Python, and does there what a newcomer does: init, plan, merge, report.
#   BUILDER  interpreter that has the package `build`
#   PYTHONS  versions to try; each must be there as pythonX.Y
#   CONSTRAINTS  versions of other packages on Python 3.11; empty: what pip chooses, as elsewhere
set -euo pipefail
cd "$(dirname "$0")/.."
BUILDER="${BUILDER:-.venv/bin/python}"
PYTHONS="${PYTHONS:-3.10 3.11 3.12}"
CONSTRAINTS="${CONSTRAINTS-constraints/tested.txt}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== wheel and source archive"
"$BUILDER" -m build --no-isolation --outdir "$work/dist" . >"$work/build.log" 2>&1 || {
    tail -n 20 "$work/build.log" >&2
    exit 1
}
ls -l "$work/dist"
wheel=$(echo "$work"/dist/*.whl)
# What is in the archive must be enough to make the same wheel again.
"$BUILDER" -m pip wheel -q --no-deps --no-build-isolation -w "$work/again" "$work"/dist/*.tar.gz
test "$(basename "$wheel")" = "$(ls "$work/again")"

newcomer="$PWD/scripts/newcomer.py"
failed=()
for version in $PYTHONS; do
    echo "== Python $version"
    python="python$version"
    if ! "$python" -c "" 2>/dev/null; then
        echo "not here: $python" >&2
        failed+=("$version")
        continue
    fi
    bound=()
    # The versions that are tested fit one Python.
    if [ -n "$CONSTRAINTS" ] && [ "$version" = 3.11 ]; then
        bound=(-c "$PWD/$CONSTRAINTS")
    fi
    "$python" -m venv "$work/$version"
    mkdir "$work/empty-$version"
    if "$work/$version/bin/python" -m pip install -q "${bound[@]}" "$wheel" &&
        "$work/$version/bin/python" -m pip check &&
        (cd "$work/empty-$version" && "$work/$version/bin/python" "$newcomer"); then
        echo "== Python $version: passed"
    else
        failed+=("$version")
    fi
    # An environment is gigabytes where torch brings CUDA.
    rm -rf "${work:?}/$version"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
echo "passed: $PYTHONS"
