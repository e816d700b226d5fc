"""lab/variants.py: patches are read, applied, run, and faults are told from broken ones."""

import difflib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import error_of

from lab import variants
from lab.variants import UserError, apply, load

ROOT = Path(__file__).parent.parent
SCRIPT = '''import sys
import common
def double(n):
    if n < 0:
        return 0

    return 2 * n

if __name__ == "__main__":
    print(sys.argv[1:], double(3), common.WORD, sys.argv[0].endswith("/mini.py"))
    sys.exit(int(sys.argv[-1]))
'''
TESTS = '''import mini
def test_double(): assert mini.double(3) == 6
def test_type(): assert isinstance(mini.double(3), int)
def test_failing(): assert False
'''


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree with one script and its tests; tree(text) writes its rows file and loads it."""
    root = tmp_path / "tree"
    (root / "lab/rows").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "mini.py").write_text(SCRIPT)
    (root / "common.py").write_text("WORD = 'plain'\n")
    (root / "tests/test_mini.py").write_text(TESTS)
    monkeypatch.setattr(variants, "ROOT", root)

    def write(text):
        (root / "lab/rows/mini.txt").write_text(text)
        return load("mini")

    return write


TRIPLE = "# c\n\nrow triple: 3 n\nflags: --a 'b c'\n-    return 2 * n\n+    return 3 * n\n"
FAULTS = "".join(
    f"fault {name}: of mini.py\ntest: {test}\n-{old}\n+{new}\n\n" for name, test, old, new in (
        ("wrong", "test_double", "    return 2 * n", "    return 3 * n"),
        ("harmless", "test_type", "        return 0", "        return 0.0"),
        ("endless", "test_type", "    return 2 * n", "    while True: pass"),
        ("unimportable", "test_double", "import common", "import common, no_such_module"),
        ("ungrammatical", "test_double", "    return 2 * n", "    return return"),
        ("outdated", "test_double", "    return 4 * n", "    return 5 * n")))


def test_fields(tree):
    row, fault = tree("row a.b+c-d: of flags: only\nflags: --x 1 --y 'two words'\n\n"
                      "fault f: broken\ntest: test_a or test_b\nfile: common.py\n-x\n+y\n")
    assert (row.kind, row.name, row.about) == ("row", "a.b+c-d", "of flags: only")
    assert row.flags == ["--x", "1", "--y", "two words"] and row.hunks == [] and row.test == ""
    assert row.file == "mini.py" and fault.file == "common.py"
    assert fault.test == "test_a or test_b" and fault.hunks == [["-x", "+y"]]


def test_apply_and_back(tree):
    patch, = tree("fork both: two hunks, a blank line in one\n-import sys\n+import os\n"
                  "+import sys\n@@\n         return 0\n-\n     return 2 * n\n")
    text = apply(patch, SCRIPT)
    assert text == SCRIPT.replace("import sys", "import os\nimport sys", 1).replace(
        "return 0\n\n", "return 0\n")
    swap = {"-": "+", "+": "-", " ": " "}
    patch.hunks = [[swap[line[0]] + line[1:] for line in hunk] for hunk in patch.hunks]
    assert apply(patch, text) == SCRIPT


@pytest.mark.parametrize("hunk, message", [
    ("-    return 3 * n\n+    return 2 * n", "'return 3 * n' found 0 times in mini.py"),
    ("-return 2 * n\n+return 0", "'return 2 * n' found 0 times"),  # indentation counts
    ("-    return 2 \n+    return 0", "'return 2' found 0 times"),  # and whole lines
    ("-\n+pass", "'' found 3 times"),
    ("-    if n < 0:\n         return 1", "'if n < 0:' with 1 more below found 0 times")])
def test_a_patch_that_does_not_fit_is_named(tree, hunk, message):
    patch, = tree(f"exercise x: y\n{hunk}\n")
    with pytest.raises(UserError) as error:
        apply(patch, SCRIPT)
    assert str(error.value).startswith("lab/rows/mini.txt: exercise x no longer applies: ")
    assert message in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("rows a: b", "line 1: expected KIND NAME: ABOUT"),
    ("# c\nrow a b: c", "line 2: expected"),
    ("row a: b\nflag: -x", "line 2: expected"),
    ("row a: b\nfile: lab/toy.py\n-x\n+y", "line 2: expected"),
    ("row a: b\n-x\n+y\nflags: -x", "line 4: expected"),
    ("row a: b\n-x\n+y\n\n-z\n+z", "line 5: expected"),      # a blank line without its marker
    ("row a: b\n-x\n+y\n# c", "line 4: expected"),
    ("row a: b\nflags: -x\n\nrow a: c\nflags: -y", "line 1: row a: not the only one"),
    ("row a: b", "row a: changes nothing"),
    ("fault a: b\n-x\n+y", "fault a: needs hunks and test:"),
    ("fault a: b\ntest: t\nflags: -x", "fault a: needs hunks and test:"),
    ("row a: b\n x\n@@\n-y", "line that is there"),
    ("row a: b\n+y", "line that is there"),
    ("row a: b\n-y\n@@", "line that is there"),
    ("row a: b\n-x\n" + "+y\n" * 11, "changes 11 lines, more than 10"),
    ("fork a: b\n-x\n" + "+y\n" * 17, "changes 17 lines, more than 16")])
def test_mistakes_in_a_rows_file_are_named(tree, text, message):
    with pytest.raises(UserError) as error:
        tree(text)
    assert str(error.value).startswith("lab/rows/mini.txt, line ") and message in str(error.value)


@pytest.mark.parametrize("script", sorted(p.stem for p in (ROOT / "lab/rows").glob("*.txt")))
def test_every_patch_applies_today(script):
    """And leaves Python, with no more than ten lines added or gone, sixteen in a fork."""
    assert (patches := load(script))
    for patch in patches:
        before = (ROOT / patch.file).read_text()
        after = apply(patch, before)
        compile(after, patch.file, "exec")
        assert (after != before) == bool(patch.hunks)
        diff = difflib.unified_diff(before.split("\n"), after.split("\n"), n=0)
        signs = [line[0] for line in diff]  # with two lines of a head, --- and +++
        assert max(signs.count("-"), signs.count("+")) <= (17 if patch.kind == "fork" else 11)


def test_run_hands_on_flags_folder_and_exit_code(tree, capfd, monkeypatch, tmp_path):
    tree(TRIPLE + "\nfork word: x\nfile: common.py\n-WORD = 'plain'\n+WORD = 'patched'\n")
    monkeypatch.chdir(tmp_path)
    assert variants.run("mini", None, ["0"]) == 0
    assert variants.run("mini", "word", ["0"]) == 0
    with pytest.raises(SystemExit) as stop:
        variants.main(["run", "mini", "triple", "--jobs", "2", "7"])
    assert stop.value.code == 7
    assert capfd.readouterr().out.splitlines() == [
        "['0'] 6 plain True", "['0'] 6 patched True",
        "['--a', 'b c', '--jobs', '2', '7'] 9 plain True"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tree"]  # nothing is left behind


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_waits_for_a_stopped_script(tree, tmp_path, number):
    """Ctrl-C reaches the whole group, SIGTERM the runner alone; the script saves, then ends."""
    tree("row none: nothing\nflags: -x\n")
    (variants.ROOT / "mini.py").write_text('''import signal, sys, time
def save(number, _):
    time.sleep(0.8)  # longer than subprocess grants after Ctrl-C
    open("saved", "a").write(str(number))
    sys.exit(130)
for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, save)
open("ready", "w")
time.sleep(30)
''')
    (variants.ROOT / "common.py").write_text("UserError = entry = None\n")  # loads no torch
    code = (f"from lab import variants as v; v.ROOT = v.Path({str(variants.ROOT)!r}); "
            "v.sys.exit(v.run('mini', 'none', []))")
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True,
                             env={**os.environ, "PYTHONPATH": f"{variants.ROOT}{os.pathsep}{ROOT}"})
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(child.pid, number)
    assert child.wait(20) == 130
    assert (tmp_path / "saved").read_text() == str(int(number))


def test_list_and_show(tree, capsys):
    tree(TRIPLE)
    variants.main(["list"])
    assert capsys.readouterr().out == "mini.py\n  row triple: 3 n --a 'b c'\n"
    variants.main(["show", "mini", "triple"])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "triple: --a 'b c'"
    assert [line for line in out if line[0] in "+-"] == [
        "--- mini.py", "+++ mini.py", "-    return 2 * n", "+    return 3 * n"]
    assert "'nothing', found triple" in error_of(capsys, variants.main, "show", "mini", "nothing")
    assert "lab/rows/maxi.txt: no such file" in error_of(capsys, variants.main, "list", "maxi")


def test_faults_are_killed_survive_or_are_broken(tree, capsys):
    tree(FAULTS)
    names = ["wrong", "harmless", "unimportable", "ungrammatical", "outdated"]
    with pytest.raises(UserError, match="lab/rows/mini.txt: broken faults"):
        variants.faults("mini", names, 2)
    *lines, total = capsys.readouterr().out.splitlines()
    assert total == "1 of 5 killed"
    found = dict(line.split(": ", 1) for line in lines)
    assert found["wrong"].startswith("killed by test_double in ")
    assert found["harmless"].startswith("SURVIVES test_type in ")
    assert found["unimportable"].startswith("BROKEN: ModuleNotFoundError")
    assert found["ungrammatical"].startswith("BROKEN: invalid syntax (mini.py, line ")
    assert "'return 4 * n' found 0 times in mini.py" in found["outdated"]


def test_exit_codes_and_timeout(tree, capsys, monkeypatch):
    tried, seen = variants.tried, []

    def impatient(script, test, changed, timeout=None):
        seen.append(timeout)
        return tried(script, test, changed, timeout and 2)

    monkeypatch.setattr(variants, "tried", impatient)
    tree(FAULTS)
    variants.main(["faults", "mini", "endless"])
    assert capsys.readouterr().out == "endless: killed by timeout in 2 s\n1 of 1 killed\n"
    assert seen[0] is None and seen[1] > variants.PATIENCE  # the clean run has no limit
    monkeypatch.setattr(variants, "tried", tried)
    with pytest.raises(SystemExit) as stop:
        variants.main(["faults", "mini", "harmless"])
    assert stop.value.code == 1
    assert "no fault lost" in error_of(capsys, variants.main, "faults", "mini", "wrong", "lost")


@pytest.mark.parametrize("test, message", [
    ("test_nothing", "-k 'test_nothing' selects no test"),
    ("test_failing", "-k 'test_failing' does not pass without a fault: test_failing")])
def test_named_tests_must_pass_without_a_fault(tree, capsys, test, message):
    tree(FAULTS.split("\n\n")[0].replace("test_double", test) + "\n")
    assert message in error_of(capsys, variants.main, "faults", "mini")
