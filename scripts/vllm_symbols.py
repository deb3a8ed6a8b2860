"""Write tests/vllm_symbols.json: what every name of vLLM that this package touches is, in each supported version.

    python scripts/vllm_symbols.py SOURCES [SOURCES ...]

SOURCES is a folder with ``vllm/`` in it: the site-packages of an environment, or an unpacked wheel (`pip download
--no-deps vllm==X`, then unzip). Its version is read from vllm/_version.py and takes that version's place in the list;
the other versions stay as they are. Nothing of vLLM is imported, so that GPU builds are read on any machine.

An entry is keyed "module:attribute". For each version it says where the name is defined, what it is, its parameters (of
a class: those of its constructor), and those attributes that we use or override. Parameters are spelled as in a
signature, without annotations; "=" stands for any default. null: that version has no such name.
"""

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vllm_dsa"
LIST = ROOT / "tests" / "vllm_symbols.json"
Entry = dict[str, Any]
Function = ast.FunctionDef | ast.AsyncFunctionDef


# What we touch.


@dataclass(frozen=True)
class Call:
    """One call of a name: ``positional`` arguments, then ``keywords``; ``open_ended`` if it has * or **."""

    where: str
    positional: int
    keywords: tuple[str, ...]
    open_ended: bool


@dataclass
class Use:
    """How the package uses one name: its calls, the attributes read from it with their calls, and what subclasses of
    ours define, with its parameters."""

    calls: list[Call] = field(default_factory=list)
    attributes: dict[str, list[Call]] = field(default_factory=dict)
    defines: dict[str, list[str]] = field(default_factory=dict)


def names_of(compat: ast.Module) -> dict[str, str]:
    """The table NAMES of compat.py: name here -> "module:attribute"."""
    for node in compat.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NAMES":
            return ast.literal_eval(node.value)
    raise ValueError("compat.py has no table NAMES")


def uses(package: Path = PACKAGE) -> dict[str, Use]:
    """Every name of vLLM that the package touches -> how, by the source of its modules."""
    table = names_of(ast.parse((package / "compat.py").read_text()))
    found: dict[str, Use] = {target: Use() for target in table.values()}
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text())
        _Uses(str(path.relative_to(package)), table, found).visit(tree)
    return found


class _Uses(ast.NodeVisitor):
    """Collects the uses in one module. Imports are followed wherever they stand; names are not shadowed here."""

    def __init__(self, where: str, table: dict[str, str], found: dict[str, Use]) -> None:
        self.where, self.table, self.found = where, table, found
        self.local: dict[str, str] = {}  # local name -> "module:attribute"
        self.compat: set[str] = set()  # local names of compat itself

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            local = alias.asname or alias.name
            if (node.module or "").split(".")[0] == "vllm":
                self.local[local] = f"{node.module}:{alias.name}"
                self.found.setdefault(self.local[local], Use())
            elif node.module == "vllm_dsa.compat" and alias.name in self.table:
                self.local[local] = self.table[alias.name]
            elif node.module == "vllm_dsa" and alias.name == "compat":
                self.compat.add(local)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            name = self._target(base.value if isinstance(base, ast.Subscript) else base)
            if name:
                for item in node.body:
                    if isinstance(item, Function) and item.name != "__init__":
                        self.found[name].defines[item.name] = _described(item)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._attribute(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        call = Call(
            f"{self.where}:{node.lineno}",
            sum(not isinstance(argument, ast.Starred) for argument in node.args),
            tuple(keyword.arg for keyword in node.keywords if keyword.arg),
            any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords),
        )
        if name := self._target(node.func):
            self.found[name].calls.append(call)
        elif isinstance(node.func, ast.Attribute) and (calls := self._attribute(node.func)) is not None:
            calls.append(call)
        self.generic_visit(node)

    def _target(self, node: ast.expr) -> str | None:
        """The name of vLLM that an expression is."""
        if isinstance(node, ast.Name):
            return self.local.get(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in self.compat:
            return self.table.get(node.attr)
        return None

    def _attribute(self, node: ast.Attribute) -> list[Call] | None:
        """The calls of an attribute of a name of vLLM; of import_module("x").y too, which becomes a name itself."""
        made = node.value
        if isinstance(made, ast.Call) and getattr(made.func, "id", "") == "import_module":
            module = made.args[0]
            if isinstance(module, ast.Constant) and str(module.value).split(".")[0] == "vllm":
                return self.found.setdefault(f"{module.value}:{node.attr}", Use()).calls
        name = self._target(made)
        return None if name is None else self.found[name].attributes.setdefault(node.attr, [])


# What vLLM has.


@dataclass(frozen=True)
class Found:
    """A definition: the module and name it stands under, and its node. None: a module."""

    module: str
    name: str
    node: ast.AST | None


class Sources:
    """The modules under a folder with ``vllm/`` in it, read but never run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = cache(self._tree)
        self.bindings = cache(self._bindings)

    def version(self) -> str:
        found = self.find("vllm._version", "__version__")
        if found is None or not isinstance(found.node, ast.Assign):
            raise ValueError(f"{self.folder} has no vllm/_version.py. Name a folder with vllm/ in it.")
        return ast.literal_eval(found.node.value)

    def _path(self, module: str) -> Path | None:
        path = self.folder.joinpath(*module.split("."))
        return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)

    def _tree(self, module: str) -> ast.Module | None:
        path = self._path(module)
        return path and ast.parse(path.read_text(encoding="utf-8"))

    def _bindings(self, module: str) -> dict[str, list[ast.stmt]]:
        """Name -> the statements at module level that bind it, branches included; "*" for star imports."""
        tree, found = self.tree(module), {}
        for node in _statements(tree.body if tree else []):
            for name in _bound(node):
                found.setdefault(name, []).append(node)
        return found

    def find(self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Found | None:
        """The definition of a module's attribute, through imports, aliases and star imports.

        Of a name that several branches bind (``if current_platform.is_cuda():``), the first that leads somewhere.
        """
        if (module, name) in seen or self.tree(module) is None:
            return None
        seen |= {(module, name)}
        for node in sorted(self.bindings(module).get(name, []), key=_is_bare_annotation):
            if found := self._follow(module, name, node, seen):
                return found
        for node in self.bindings(module).get("*", []):
            if found := self.find(self._base(module, node), name, seen):
                return found
        return Found(f"{module}.{name}", "", None) if self._path(f"{module}.{name}") else None

    def _follow(self, module: str, name: str, node: ast.stmt, seen: frozenset[tuple[str, str]]) -> Found | None:
        if isinstance(node, ast.ImportFrom):
            base = self._base(module, node)
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return self.find(base, original, seen) if base.split(".")[0] == "vllm" else Found(base, original, node)
        if isinstance(node, ast.Import):
            original = next(a.name for a in node.names if (a.asname or a.name.split(".")[0]) == name)
            return Found(original, "", None)
        value = getattr(node, "value", None)
        if isinstance(value, ast.Name) and value.id != name:
            return self.find(module, value.id, seen)
        return Found(module, name, node)

    def _base(self, module: str, node: ast.ImportFrom) -> str:
        """Full name of the module that an import statement in ``module`` imports from."""
        if not node.level:
            return node.module or ""
        path = self._path(module)
        parts = module.split(".")
        above = parts[: len(parts) - node.level + bool(path and path.name == "__init__.py")]
        return ".".join([*above, *([node.module] if node.module else [])])

    def lineage(self, found: Found, seen: frozenset[tuple[str, str]] = frozenset()) -> Iterator[Found]:
        """A class and the classes of vLLM that it inherits from, nearest first."""
        if not isinstance(found.node, ast.ClassDef) or (found.module, found.name) in seen:
            return
        yield found
        for base in found.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name) and (above := self.find(found.module, base.id)):
                yield from self.lineage(above, seen | {(found.module, found.name)})

    def member(self, found: Found, name: str) -> ast.stmt | None:
        """What a class or its bases define under a name."""
        for owner in self.lineage(found):
            for node in _statements(owner.node.body):
                if name in _bound(node) and not _is_overload(node):
                    return node
        return None

    def constructor(self, found: Found) -> list[str] | None:
        """Parameters of a class: of its __init__, else the fields of a dataclass. None if neither is vLLM's."""
        init = self.member(found, "__init__")
        if isinstance(init, Function):
            return _parameters(init)[1:]
        lineage = list(self.lineage(found))
        if not any(_is_dataclass(owner.node) for owner in lineage):
            return None
        fields: dict[str, str] = {}
        for owner in reversed(lineage):
            for node in owner.node.body:
                if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.dump(node.annotation):
                    init = [k.value for k in getattr(node.value, "keywords", []) if k.arg == "init"]
                    if not init or ast.literal_eval(init[0]):
                        fields[node.target.id] = node.target.id + "=" * (node.value is not None)
        kw_only = any("kw_only=True" in ast.unparse(d) for owner in lineage for d in owner.node.decorator_list)
        return [*(["*"] if kw_only else []), *fields.values()]

    def entry(self, target: str, attributes: list[str]) -> Entry | None:
        """What this version has under "module:attribute"; None: nothing."""
        found = self.find(*target.split(":"))
        if found is None:
            return None
        node, owner = found.node, found
        if node is None:
            entry: Entry = {"kind": "module"}
            members = {name: self._top(found.module, name) for name in attributes}
        else:
            entry = {"kind": _kind(node)}
            if isinstance(node, Function):
                entry["parameters"] = _parameters(node)
            elif isinstance(node, ast.ClassDef):
                entry["parameters"] = self.constructor(found)
            else:
                owner = self._class_of(found) or found
            members = {name: self.member(owner, name) for name in attributes}
        home = f"{found.module}:{found.name}" if node else found.module
        entry = ({} if home == target else {"home": home}) | entry
        known = {name: _described(member) for name, member in sorted(members.items()) if member is not None}
        return entry | ({"attributes": known} if known else {})

    def _top(self, module: str, name: str) -> ast.AST | None:
        found = self.find(module, name)
        return found and found.node

    def _class_of(self, found: Found) -> Found | None:
        """The class of a module's variable, by its annotation or by the call that makes it."""
        node = found.node
        made = getattr(node, "annotation", None) or getattr(getattr(node, "value", None), "func", None)
        return self.find(found.module, made.id) if isinstance(made, ast.Name) else None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body and of the branches in it, not of functions and classes."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            handlers = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            last = [*getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            yield from _statements([*node.body, *handlers, *last])


def _bound(node: ast.stmt) -> list[str]:
    """Names that a statement binds."""
    if isinstance(node, Function | ast.ClassDef):
        return [] if _is_overload(node) else [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def _is_bare_annotation(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and node.value is None


def _is_overload(node: ast.stmt) -> bool:
    return any("overload" in ast.unparse(d) for d in getattr(node, "decorator_list", []))


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(d) or ast.unparse(d) == "config" for d in node.decorator_list)


def _kind(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    return "function" if isinstance(node, Function) else "value"


def _described(node: ast.AST) -> Any:
    """Parameters of a method without self or cls, "value" for anything else."""
    if not isinstance(node, Function):
        return _kind(node)
    bound = [p for p in _parameters(node)[:1] if p in ("self", "cls")]
    return _parameters(node)[len(bound) :]


def _parameters(node: Function) -> list[str]:
    """Parameters as in a signature: "x", "y=", "*", "*args", "z=", "**options"."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    spelled = [a.arg + "=" * (i >= required) for i, a in enumerate(positional)]
    if arguments.posonlyargs:
        spelled.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg or arguments.kwonlyargs:
        spelled.append(f"*{arguments.vararg.arg if arguments.vararg else ''}")
    spelled += [a.arg + "=" * (d is not None) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return spelled + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


# The list.


def minor(version: str) -> str:
    """ "0.32" of "0.32.0+cpu"."""
    return ".".join(version.split(".")[:2])


def entries(sources: Sources, used: dict[str, Use]) -> dict[str, Entry | None]:
    """Every used name -> what ``sources`` has under it."""
    return {target: sources.entry(target, [*use.attributes, *use.defines]) for target, use in sorted(used.items())}


def misfit(call: Call, parameters: list[str]) -> str | None:
    """Why a call does not fit a signature; None: it does."""
    names = [p.rstrip("=") for p in parameters if not p.startswith("*") and p != "/"]
    star = next((i for i, p in enumerate(parameters) if p.startswith("*") and not p.startswith("**")), None)
    spelled = [p for p in parameters[:star] if not p.startswith("**") and p != "/"]
    takes_more = star is not None and parameters[star] != "*"
    if call.positional > len(spelled) and not takes_more:
        return f"{call.where} passes {call.positional} positional arguments, it takes {len(spelled)}"
    given = {p.rstrip("=") for p in spelled[: call.positional]}
    unknown = [k for k in call.keywords if k not in names or k in given]
    if unknown and not any(p.startswith("**") for p in parameters):
        return f"{call.where} passes {', '.join(unknown)}, it takes {', '.join(parameters)}"
    needed = {p for p in parameters if not p.endswith("=") and not p.startswith("*") and p != "/"}
    lacking = sorted(needed - given - set(call.keywords))
    return f"{call.where} does not pass {', '.join(lacking)}" if lacking and not call.open_ended else None


def misfits(used: dict[str, Use], found: dict[str, Entry | None]) -> list[str]:
    """One line for each name that is missing, each call that does not fit, each override that takes less."""
    lines = []
    for target, use in used.items():
        entry = found.get(target)
        if entry is None:
            lines.append(f"{target}: missing")
            continue
        calls = [(call, entry.get("parameters")) for call in use.calls]
        known = entry.get("attributes", {})
        calls += [(call, known.get(name)) for name, attribute in use.attributes.items() for call in attribute]
        for call, parameters in calls:
            if isinstance(parameters, list) and (why := misfit(call, parameters)):
                lines.append(f"{target}: {why}")
        if entry["kind"] in ("module", "class"):
            lines += [f"{target}.{n}: missing" for n in use.attributes if n not in known and not n.startswith("__")]
        for name, ours in use.defines.items():
            theirs = [p.rstrip("=") for p in known.get(name, []) if not p.startswith("*")]
            lacking = [p for p in theirs if p not in [q.rstrip("=") for q in ours]]
            if lacking and not any(p.startswith("**") for p in ours):
                lines.append(f"{target}.{name}: ours does not take {', '.join(lacking)}")
    return lines


def main(folders: list[str]) -> None:
    if not folders:
        sys.exit(__doc__)
    used = uses()
    listed = json.loads(LIST.read_text()) if LIST.exists() else {"versions": {}, "names": {}}
    for folder in folders:
        sources = Sources(Path(folder))
        version = sources.version()
        listed["versions"][minor(version)] = version
        for target, entry in entries(sources, used).items():
            listed["names"].setdefault(target, {})[minor(version)] = entry
    listed["versions"] = dict(sorted(listed["versions"].items()))
    listed["names"] = {t: dict(sorted(listed["names"][t].items())) for t in sorted(used)}
    LIST.write_text(written(listed))
    for version in listed["versions"]:
        lines = misfits(used, {target: entry.get(version) for target, entry in listed["names"].items()})
        print(*[f"{version}: {line}" for line in lines], sep="\n", end="\n" * bool(lines))
    print(f"{LIST.relative_to(ROOT)}: {len(used)} names in vLLM {', '.join(listed['versions'].values())}")


def written(listed: dict[str, Any]) -> str:
    """The list as JSON, one version of a name a line, so that a change shows as one line."""
    names = []
    for target, versions in listed["names"].items():
        lines = ",\n".join(f"      {json.dumps(version)}: {json.dumps(entry)}" for version, entry in versions.items())
        names.append(f"    {json.dumps(target)}: {{\n{lines}\n    }}")
    body = ",\n".join(names)
    return f'{{\n  "versions": {json.dumps(listed["versions"])},\n  "names": {{\n{body}\n  }}\n}}\n'


if __name__ == "__main__":
    main(sys.argv[1:])
