"""All that arm_ray writes goes through `storage/atomic.py`, but for a list that says why not.

A file that is opened for writing under its own name can be seen half written, and after a power cut
a rename may be on disk before what it renames. The search is of the syntax tree: opening for
writing, in any spelling, copies, renames, and libraries that write files.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest

from tests.builders.paths import ROOT

_PACKAGE = ROOT / "arm_ray"
# Module, function and what it calls -> why that is safe.
ALLOWED: dict[tuple[str, str, str], str] = {
    # Methods of that name that open something for reading.
    ("checkpoints/formats.py", "open_source", "open"): "a checkpoint",
    ("following/posting.py", "post", "open"): "an address",
    ("runtime/session/telemetry.py", "_work", "open"): "trackers",
    ("storage/store.py", "open_url", "open"): "a file in a store",
    ("evaluation/code/backends.py", "processes", "os.open"): "a directory of /proc",
    # Mapped memory without a file.
    ("runtime/shards/weights.py", "host_memory", "mmap.mmap"): "MAP_ANONYMOUS",
    # Mapped for reading alone.
    ("checkpoints/pickles.py", "load", "mmap.mmap"): "PROT_READ",
    ("checkpoints/pickles.py", "unpickle", "mmap.mmap"): "PROT_READ",
    # Unfinished files with names that nothing reads, and what gives them their names.
    ("storage/atomic.py", "atomic_file", "open"): "the writer itself",
    ("storage/atomic.py", "_open_own", "open"): "the writer itself",
    ("storage/atomic.py", "atomic_file", "replace"): "the writer itself",
    ("storage/atomic.py", "copy_file", "copyfileobj"): "into an atomic file",
    ("storage/atomic.py", "put_file", "replace"): "after a sync of the content",
    ("storage/atomic.py", "put_directory", "rename"): "after a sync of the names",
    ("checkpoints/weight_file.py", "create", "open"): "in model.partial, renamed as a whole",
    ("checkpoints/weight_file.py", "open", "open"): "in model.partial, renamed as a whole",
    ("runtime/cluster/node_files.py", "write", "os.open"): "a .partial file; `finish` syncs it",
    ("following/snapshots.py", "_copy", "open"): "in a .partial directory, and synced",
    ("following/snapshots.py", "_link", "os.link"): "in a .partial directory",
    ("following/publish.py", "_link_or_copy", "os.link"): "in a .partial directory",
    ("following/publish.py", "_point", "symlink_to"): "a .partial link",
    ("following/publish.py", "_point", "os.replace"): "a link that is there takes its name at once",
    # Directories that are whole, or are on their way out.
    ("following/publish.py", "recover", "rename"): "puts a whole directory back",
    ("following/publish.py", "_keep_best", "rename"): "a synced directory",
    ("following/publish.py", "_put", "rename"): "a synced directory, and one on its way out",
    ("following/publish.py", "_prune", "rename"): "one on its way out",
    ("following/snapshots.py", "remove", "rename"): "one on its way out",
    ("runtime/verify.py", "repair", "rename"): "puts a damaged model back",
    ("runtime/verify.py", "_set_aside", "rename"): "sets a damaged model aside",
    ("runtime/scoring/lm_eval.py", "*", "replace"): "keeps an earlier result under another name",
    # Logs that grow line by line, whose readers pass over a last line that is cut off.
    ("events.py", "write", "open"): "a log",
    ("training/trainer.py", "on_log", "open"): "a log",
    ("training/trainer.py", "note", "open"): "notes for people, in the scratch directory",
    ("runtime/study/merging.py", "_start", "open"): "what a process prints",
    ("integrations/callback.py", "_start", "open"): "what a process prints",
    # Nothing that anybody goes on from.
    ("storage/room.py", "locked", "open"): "a lock, which is empty",
    ("runtime/scoring/model_copies.py", "_claim", "open"): "a lock, which is empty",
    ("runtime/scoring/model_copies.py", "_fetch", "open"): "a copy that this process alone knows",
    ("runtime/merge/state_storage.py", "_blind", "write_text"): "a token, removed at once",
    ("following/hooks.py", "_run", "NamedTemporaryFile"): "for one process, removed at once",
    ("evaluation/code/self_test.py", "*", "NamedTemporaryFile"): "bait, removed at once",
    ("cli/saying.py", "said", "open"): "/dev/null",
    ("cli/entry.py", "_discard_output", "os.open"): "/dev/null",
    # Checkpoints that a trainer writes, complete once `checkpoint_writer` says so.
    ("training/trainer.py", "_save_beside", "save_pretrained"): "Hugging Face's own trainer",
    ("training/trainer.py", "_save_beside", "torch.save"): "Hugging Face's own trainer",
    ("training/trainer.py", "_save_optimizer_and_scheduler", "torch.save"): "as the trainer's own",
    # Bytes that `atomic_file` gave a stream for.
    ("evaluation/records.py", "write_records", "pq.write_table"): "into an atomic file",
    ("study/results.py", "write_results", "pq.write_table"): "into an atomic file",
    ("study/render.py", "draw", "savefig"): "into memory, and then into an atomic file",
    ("evaluation/grading/worker.py", "main", "fdopen"): "a pipe to the process that grades",
}
_METHODS = {
    "write_text", "write_bytes", "symlink_to", "hardlink_to", "touch", "save_pretrained", "tofile",
    "to_parquet", "to_csv", "savefig", "rename",
}  # fmt: skip
_FUNCTIONS = {
    ("json", "dump"), ("pickle", "dump"), ("torch", "save"), ("np", "save"), ("np", "savez"),
    ("np", "memmap"), ("os", "rename"), ("os", "replace"), ("os", "link"), ("os", "symlink"),
    ("os", "truncate"), ("pq", "write_table"), ("mmap", "mmap"),
}  # fmt: skip
_BARE = {"save_file", "serialize_file", "NamedTemporaryFile", "mkstemp", "copyfileobj"}
_COPIES = {"copy", "copy2", "copyfile", "copytree", "move", "copyfileobj"}


Imported = Mapping[str, tuple[str, str]]


def written(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """Function, call and line of what writes a file in a module."""
    imported = {
        alias.asname or alias.name: (str(node.module), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    yield from _in(tree, "*", imported)


def _in(node: ast.AST, function: str, imported: Imported) -> Iterator[tuple[str, str, int]]:
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else None
        if isinstance(child, ast.Call):
            name = _writes(child, imported)
            if name is not None:
                yield function, name, child.lineno
        yield from _in(child, inner or function, imported)


def _writes(call: ast.Call, imported: Imported) -> str | None:
    """What a call that writes a file is called; None: it writes none."""
    module: str | None
    if isinstance(call.func, ast.Name):
        of = None
        module, name = imported.get(call.func.id, (None, call.func.id))
    elif isinstance(call.func, ast.Attribute):
        name, of = call.func.attr, call.func.value
        module = of.id if isinstance(of, ast.Name) else None
    else:
        return None
    if name == "open" and module == "os":
        return None if _mentions(call, "O_RDONLY") else "os.open"
    if name in ("open", "fdopen"):
        return name if any(set(mode) & set("wax+") for mode in _modes(call, of)) else None
    if (module, name) in _FUNCTIONS:
        return f"{module}.{name}"
    if module == "yaml" and name.startswith(("dump", "safe_dump")):
        streams = len(call.args) > 1 or any(k.arg == "stream" for k in call.keywords)
        return "yaml.dump" if streams else None
    if module == "shutil" and name in _COPIES:
        return name
    if name in _BARE or (of is not None and name in _METHODS):
        return name
    # `Path.replace` takes one argument; that of texts two, and of dataclasses keywords.
    is_path = of is not None and module not in ("dataclasses", "re")
    if name == "replace" and is_path:
        is_target = [keyword.arg for keyword in call.keywords] == ["target"]
        return name if is_target or (len(call.args) == 1 and not call.keywords) else None
    return None


def _modes(call: ast.Call, of: ast.expr | None) -> list[str]:
    """The mode of an `open`, where it is written there; an unknown one counts as writing."""
    given = [k.value for k in call.keywords if k.arg == "mode"]
    # The built-in one, and those of modules, have the file first.
    modules = ("gzip", "io", "os", "bz2", "lzma")
    has_file = of is None or (isinstance(of, ast.Name) and of.id in modules)
    place = 1 if has_file else 0
    given += call.args[place : place + 1]
    found = []
    for value in given:
        texts = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant)]
        modes = [text for text in texts if isinstance(text, str) and set(text) <= set("rwaxbt+")]
        # What is named by a text that is no mode is a member of an archive.
        found += modes or ([] if isinstance(value, ast.Constant) else ["w"])
    return found


def _mentions(call: ast.Call, *flags: str) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr in flags for n in ast.walk(call))


def found() -> Counter[tuple[str, str, str]]:
    """All places of the package."""
    places: Counter[tuple[str, str, str]] = Counter()
    for path in sorted(_PACKAGE.rglob("*.py")):
        module = path.relative_to(_PACKAGE).as_posix()
        for function, call, _ in written(ast.parse(path.read_text(encoding="utf-8"))):
            places[module, function, call] += 1
    return places


def is_allowed(place: tuple[str, str, str]) -> bool:
    module, _, call = place
    return place in ALLOWED or (module, "*", call) in ALLOWED


def test_all_that_is_written_goes_through_the_atomic_writer() -> None:
    places = found()
    assert len(places) > 20
    assert sorted(place for place in places if not is_allowed(place)) == []


def test_nothing_is_allowed_that_is_not_there() -> None:
    places = found()
    used = {p for p in places if p in ALLOWED} | {(m, "*", c) for m, _, c in places}
    assert sorted(set(ALLOWED) - used) == []


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("open(path, 'w')", True),
        ("open(path, mode='ab')", True),
        ("path.open('x')", True),
        ("path.open('r+b')", True),
        ("gzip.open(path, 'wt')", True),
        ("os.fdopen(handle, 'w')", True),
        ("open(path)", False),
        ("path.open('rb')", False),
        ("path.write_text('x')", True),
        ("path.with_name('b').write_bytes(b'')", True),
        ("os.open(path, os.O_WRONLY | os.O_CREAT)", True),
        ("os.open(path, os.O_RDONLY)", False),
        ("shutil.copyfile(a, b)", True),
        ("shutil.move(a, b)", True),
        ("partial.replace(path)", True),
        ("partial.replace(target=path)", True),
        ("from os import replace\nreplace(a, b)", True),
        ("from shutil import copyfile as copied\ncopied(a, b)", True),
        ("open(path, mode)", True),
        ("path.open(mode)", True),
        ("open(path, 'w' if a else 'r')", True),
        ("os.open(path, flags)", True),
        ("os.open(path, os.O_RDONLY | flags)", False),
        ("text.replace('a', 'b')", False),
        ("dataclasses.replace(a, b=1)", False),
        ("os.replace(a, b)", True),
        ("a.rename(b)", True),
        ("json.dump(content, file)", True),
        ("json.dumps(content)", False),
        ("yaml.safe_dump(content, file)", True),
        ("yaml.safe_dump(content, sort_keys=False)", False),
        ("torch.save(x, path)", True),
        ("save_file(tensors, path)", True),
        ("np.save(path, x)", True),
        ("link.symlink_to(path)", True),
        ("tempfile.NamedTemporaryFile()", True),
    ],
)
def test_the_search_finds_what_it_is_for(line: str, is_found: bool) -> None:
    assert bool(list(written(ast.parse(line)))) == is_found
