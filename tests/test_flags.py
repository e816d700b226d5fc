"""Whatever is given to a flag: it works, or one line says what is wrong, and the exit code is 2.

    python test_flags.py SCRIPT FOLDER      # all bad values of a script, each in a short training
"""

import argparse
import contextlib
import importlib
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import kills  # noqa: E402
from test_fork import FORKS, draw  # noqa: E402
from test_readme import SCRIPTS, parser_of  # noqa: E402

import common  # noqa: E402

NUMBERS = ["-1", "0", "nan", "inf", "-inf", "1e30", "-1e-9", "1.5", "x", "", "9" * 30, "0x10",
           "1e9", "٣", "1_0", "--", "1 2"]
WORDS = ["", "nonsense", ".", "..", "/dev/null", "absent/file", "a" * 300, "ünï", "\n", "text.txt",
         "broken.png", "broken.pt", "--", "-", "%s", "grey.png", "0"]


def bad_values(parser):
    """[flag, word, ...] lists: what a flag is not made for, or just about."""
    for action in parser._actions:
        flag = action.option_strings[0]
        if action.dest == "help":
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            yield [f"{flag}=yes"]
            continue
        words = WORDS if action.type is None else NUMBERS
        if action.nargs is None:
            yield [flag]
            yield from ([flag, word] for word in words)
            continue
        count = action.nargs if isinstance(action.nargs, int) else 2
        yield from ([flag, *[word] * count] for word in words)
        yield from ([flag, *["1"] * n] for n in (0, count - 1, count + 1))


def what_is_wrong(code, said, flags):
    """None, if an exit code and what was printed are as they should be."""
    lines = [line for line in said.splitlines() if "error: " in line]
    if "Traceback" in said or code not in (0, 2):
        return f"{flags}: exit code {code}: {said[-600:]}"
    if code == 2 and len(lines) != 1:
        return f"{flags}: {len(lines)} lines of errors: {said[-300:]}"


def test_eighty_bad_values(tmp_path, monkeypatch, capsys):
    """Of all scripts' flags, drawn at random; parsed and checked only."""
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    monkeypatch.setattr(common, "GREY", None)
    monkeypatch.setattr(common, "SIDE", None)
    monkeypatch.setattr(common, "TRAINED", common.math.inf)
    cases = []
    for script in SCRIPTS:
        with monkeypatch.context() as patch:
            parser = parser_of(script, patch)
        cases += [(script, flags) for flags in bad_values(parser)]
    refused = 0
    for script, flags in random.Random(0).sample(cases, 80):
        monkeypatch.setattr(sys, "argv", [f"{script}.py"])
        code = 0
        try:
            common.entry(lambda: importlib.import_module(script).get_args(flags))  # noqa: B023
        except SystemExit as stop:
            code = stop.code
        refused += code == 2
        assert not what_is_wrong(code, capsys.readouterr().err, [script, *flags])
    assert refused >= 40


@pytest.mark.slow
@pytest.mark.parametrize("script", FORKS)
def test_every_bad_value(tmp_path, script):
    done = subprocess.run(
        [sys.executable, __file__, script, tmp_path], text=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    print(done.stdout[-200:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def files(folder):
    """A text, damaged files and a grey picture."""
    from PIL import Image
    (folder / "text.txt").write_text("hello")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    (folder / "broken.pt").write_bytes(b"PK\3\4" + bytes(40))
    Image.new("L", (20, 30), 99).save(folder / "grey.png")


def main(name, folder):
    """Every fifth bad value (EVERY=1: each) in a training of one step, in a copy of this process, 6
    GB and 30 seconds."""
    folder = Path(folder)
    os.chdir(folder)
    layout, tiny, _, _ = FORKS[name]
    draw(folder / "data", layout)
    files(folder)
    script = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        cases = [*bad_values(parser_of(name, patch))][::int(os.environ.get("EVERY", 5))]
    kills.warm()
    sys.argv = [f"{name}.py"]
    tried, faults, counts = folder / "said.txt", [], {}
    base = ["--data", str(folder / "data"), "--steps", "1", *tiny.split(), "--workers", "0",
            "--device", "cpu", "--log-every", "1"]

    for i, flags in enumerate(cases):
        def body():
            resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (30, 40))
            with open(tried, "w") as text, contextlib.redirect_stdout(text), \
                    contextlib.redirect_stderr(text):
                common.entry(lambda: script.main([*base, "--out", f"run{i}", *flags]))  # noqa: B023
        code = kills.forked(body)
        counts[code] = counts.get(code, 0) + 1
        long = flags[0] in ("--steps", "--epochs") or "steps" in flags[0]
        if code == -signal.SIGXCPU and long:  # it trains, as it was told
            continue
        if fault := what_is_wrong(code, tried.read_text(), flags):
            faults.append(fault)
    print("\n".join(faults))
    print(f"{name}: {len(cases)} values, exit codes {counts}, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main(*sys.argv[1:])
