"""The order of rooms that the design fixes: imports run down, no circles, nobody imports a verb."""

import ast
import pathlib

import pytest

UNCLIP = pathlib.Path(__file__).parents[1] / "unclip"
# Each row may import from itself and from the rows below it.
ORDER = (
    ("verbs",),
    ("sweep", "launching", "studio"),
    ("protocols", "training", "drawing"),
    ("measure",),
    ("interop",),
    ("cascade", "embeddings"),
    ("tasks",),
    ("diffusion", "models"),
    ("input", "runtime"),
    ("files",),
)
LEVEL = {room: len(ORDER) - row for row, rooms in enumerate(ORDER) for room in rooms}
OUTSIDE = ("__init__", "__main__", "cli", "errors")


def _module(path: pathlib.Path) -> str:
    parts = path.relative_to(UNCLIP.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports() -> dict[str, set[str]]:
    """{module: the modules of ours that it imports, anywhere in it}."""
    paths = {_module(path): path for path in sorted(UNCLIP.rglob("*.py"))}
    found = {}
    for module, path in paths.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names += [node.module] if not set(names) & paths.keys() else []
            for name in names:
                while name and name not in paths:
                    name = name.rpartition(".")[0]
                if name and name != module:
                    found[module].add(name)
    return found


IMPORTS = _imports()


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_there_are_folders_alone():
    files = {path.stem for path in UNCLIP.glob("*.py")}
    assert files == set(OUTSIDE)
    folders = {path.name for path in UNCLIP.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders <= LEVEL.keys()
    assert not list(UNCLIP.rglob("utils.py"))


def test_imports_run_down():
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if _room(module) in LEVEL
        and _room(other) in LEVEL
        and LEVEL[_room(other)] > LEVEL[_room(module)]
    ]
    assert not wrong


@pytest.mark.parametrize("room", ["diffusion", "models"])
def test_mathematics_and_models_stand_on_files_and_errors_alone(room):
    allowed = {room, "files", "errors"}
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        if _room(module) == room
        for other in others
        if _room(other) not in allowed and other != "unclip"
    ]
    assert not wrong


def test_nothing_imports_a_verb():
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if other.startswith("unclip.verbs.")
    ]
    assert not wrong


def _circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected groups of more than one (Tarjan)."""
    index, low, stack, groups = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return groups


def test_no_module_imports_itself_round_a_circle():
    # `from unclip.room import module` is an arrow to the module, not to the room's own file.
    assert not _circles(IMPORTS)


def test_no_room_imports_itself_round_a_circle():
    rooms: dict[str, set[str]] = {}
    for module, others in IMPORTS.items():
        rooms.setdefault(_room(module), set()).update(map(_room, others))
    edges = {room: others - {room} for room, others in rooms.items() if room in LEVEL}
    assert not _circles({room: others & LEVEL.keys() for room, others in edges.items()})


@pytest.mark.parametrize("folder", [p for p in sorted(UNCLIP.rglob("*")) if p.is_dir()])
def test_no_folder_imports_its_parents_circle(folder):
    """Sub-folders of a room form no circle among themselves and the files beside them."""
    if folder.name.startswith("__"):
        return
    prefix = _module(folder / "__init__.py") + "."
    edges: dict[str, set[str]] = {}
    for module, others in IMPORTS.items():
        if not module.startswith(prefix):
            continue
        child = module[len(prefix) :].split(".")[0]
        inside = {o[len(prefix) :].split(".")[0] for o in others if o.startswith(prefix)}
        edges.setdefault(child, set()).update(inside - {child})
    assert not _circles(edges)
