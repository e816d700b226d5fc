"""What README and docstrings promise: files, flags, commands, equation tags, sizes."""

import argparse
import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import common
from lab import figures, tables, toy, variants

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {f.name: f.read_text(encoding="utf-8") for f in [ROOT / "README.md",
                                                       *(ROOT / "docs").glob("*.md")]}
SCRIPTS = [p.stem for p in sorted(ROOT.glob("*.py")) if p.stem != "common"]
SECTIONS = ["1. Configuration", "2. Networks", "3. Losses", "4. Data", "5. One training step",
            "6. Training loop", "7. Translate", "8. Main"]


def source(script):
    return (ROOT / f"{script}.py").read_text()


def docstring(script):
    return ast.get_docstring(ast.parse(source(script)))


def parser_of(script, monkeypatch):
    """The script's ArgumentParser, caught on its way to `parse_flags`."""
    caught = {}

    def catch(p, *_, **__):
        caught["parser"] = p
        raise StopIteration

    monkeypatch.setattr(common, "parse_flags", catch)
    with pytest.raises(StopIteration):
        importlib.import_module(script).get_args([])
    return caught["parser"]


def commands(text):
    """(script, flags) of every `python script.py ...` or torchrun command in a text."""
    found = []
    for line in re.sub(r"\\\n *", " ", text).splitlines():
        line = line.split("#")[0]
        for match in re.finditer(r"(?:python|torchrun(?: --\S+)*) (\w+)\.py([^`|&)]*)", line):
            found.append((match[1], shlex.split(re.sub(r"[\[\]]|\.\.\.", " ", match[2]))))
    return found


def test_table_says_which_scripts_exist():
    linked = set(re.findall(r"^\| \[(\w+)\.py\]\(\w+\.py\) ", README, re.MULTILINE))
    planned = set(re.findall(r"^\| (\w+)\.py .*\| planned \|$", README, re.MULTILINE))
    assert linked == set(SCRIPTS)
    assert not any((ROOT / f"{name}.py").exists() for name in planned)


def test_readme_is_short_and_its_links_and_pictures_are_there():
    assert len(README.splitlines()) <= 90
    for name, text in DOCS.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), f"{name}: {target}"
    pictures = [f for f in (ROOT / "docs").rglob("*") if f.suffix in (".png", ".jpg", ".webp")]
    assert 0 < sum(f.stat().st_size for f in pictures) < 800_000
    assert all(any(f"pictures/{f.name}" in text for text in DOCS.values()) for f in pictures)


def test_budgets():
    """The laboratory stays small beside the methods, and a test is no longer than what it tests."""
    lines = {f.relative_to(ROOT).as_posix(): len(f.read_text(encoding="utf-8").splitlines())
             for pattern in ("*.py", "lab/*.py", "tests/*.py") for f in ROOT.glob(pattern)}
    assert lines["common.py"] <= 1076
    assert lines.pop("lab/app.py") <= 402
    assert sum(n for name, n in lines.items() if name.startswith("lab/")) <= 2900
    for name in ("cut", "cyclegan", "sincut"):
        assert lines[f"tests/test_{name}.py"] <= lines[f"{name}.py"] * 1.12, name


@pytest.mark.parametrize("doc", DOCS)
def test_every_command_of_the_laboratory_exists(doc):
    for module, rest in re.findall(r"python -m (lab[\w.]*)([^`|)\n]*)", DOCS[doc]):
        names = shlex.split(rest.split("#")[0])
        assert importlib.util.find_spec(module), f"{doc}: {module}"
        if module == "lab.tables" and names and not names[0].startswith("-"):
            assert names[0] in tables.TABLES
        if module == "lab.figures" and len(names) > 1:
            assert tuple(names[:2]) in figures.FIGURES
        if module == "lab.toy" and names:
            assert names[0] in toy.DATASETS
        if module == "lab.variants" and names[0] in ("show", "run"):
            assert names[2] in [patch.name for patch in variants.load(names[1])]


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci/run").read_text()
    assert "pip install -r requirements.txt && pytest" in README
    assert "-r requirements.txt" in ci and "\npytest" in ci and "ruff check" in ci


def test_every_command_in_the_readme_parses():
    assert {script for script, _ in commands(README + DOCS["DATA.md"])} <= set(SCRIPTS)
    ours = [(s, flags) for s, flags in commands(README + DOCS["DATA.md"]) if "--help" not in flags]
    assert len(ours) >= 15
    for script, flags in ours:
        flags = [f for f in flags if f != "--resume"]
        if "--weights" in flags:  # the file is the reader's
            at = flags.index("--weights")
            del flags[at:at + 2]
        assert isinstance(importlib.import_module(script).get_args(flags), argparse.Namespace)


@pytest.mark.parametrize("script", SCRIPTS)
def test_equation_tags_match_the_docstring_both_ways(script):
    listed = set(re.findall(r"Eq\. \(([\d.]+)\)", docstring(script)))
    text = source(script)
    body = text[text.index("\nimport "):]
    tagged = set(re.findall(r"Eq\. \(([\d.]+)\)", body))
    assert listed == tagged and listed


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstring_parts_and_sections_in_order(script):
    doc = docstring(script)
    assert len(doc.splitlines()) <= 70
    places = [doc.index(word) for word in ("SYMBOLS", "OBJECTIVE", "CHOICES", "USAGE", "EXPECT")]
    assert places == sorted(places)
    banners = re.findall(r"^# ==== (\d\. .*?) =+$", source(script), re.MULTILINE)
    assert len(banners) == len(SECTIONS)
    assert all(b.startswith(s) for b, s in zip(banners, SECTIONS, strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_have_help_are_used_and_are_known(script, monkeypatch):
    parser = parser_of(script, monkeypatch)
    text = source(script) + (ROOT / "common.py").read_text()
    known = set()
    for action in parser._actions:
        known |= set(action.option_strings)
        assert action.help, action.dest
        if action.dest != "help":
            assert re.search(rf"args\.{action.dest}\b|rough\.{action.dest}\b", text), action.dest
    for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", docstring(script)):
        assert flag in known, flag


def test_public_functions_and_classes_of_the_shared_files_have_docstrings():
    for path in [ROOT / "common.py", *sorted((ROOT / "lab").rglob("*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert path.name == "__main__.py" or ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                described = (ast.get_docstring(node) or "dataclass" in ast.dump(node)
                             or node.name == "main")
                assert described, f"{path.name}: {node.name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_declared_twins_are_the_same_code(script):
    """A line '# same as other.py: Name' promises the same syntax tree, docstrings aside."""
    def tree(text, name):
        node = next(n for n in ast.parse(text).body if getattr(n, "name", None) == name)
        for inner in ast.walk(node):
            body = getattr(inner, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                    body[0].value, ast.Constant):
                del body[0]
        return ast.dump(node)

    for other, name in re.findall(r"# same as (\w+)\.py: (\w+)", source(script)):
        assert tree(source(script), name) == tree(source(other), name), f"{name} of {other}.py"
