"""Seconds, memory and arithmetic of one training step of every method, side by side.

    python -m lab.bench --size 256 --batch 1 --steps 3         # all methods on this machine
    python -m lab.bench cut --modes fp32 amp amp+compile --device cuda
    python -m lab.bench cut --against ../other                 # beside another checkout's scripts

The timed thing is the `train_step` that training uses, at full width, on pictures of noise. Every
row is a process with its own peak memory: the resident set on the CPU (Python and torch included),
CUDA's peak allocation on a GPU. The ceiling is a channels-last 3x3 convolution of 256 channels at
64x64 (bfloat16 with amp). With --against both sides are alive and step in turn; a ratio below 1
says that this checkout is faster, or smaller.
"""

import argparse
import contextlib
import importlib
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
# script -> rows: a name, and flags; rows that set --size themselves ignore bench's --size, --batch
ROWS = {
    "cut": [("CUT", []), ("FastCUT", ["--mode", "fastcut"])],
    "sincut": [("SinCUT, 16 crops of 64", ["--size", "64"]),
               ("SinCUT, 16 crops of 128", ["--size", "128"])],
    "cycada": [("CyCADA, stage pixel", []),
               ("CyCADA, stage pixel, Eq. (3.13) by FCN8s", ["--lambda-sem", "1"])],
    "cyclegan": [("CycleGAN", []),
                 ("CycleGAN with L_identity", ["--lambda-identity", "5"]),
                 ("CycleGAN with L_identity, anti-aliased like CUT",
                  ["--lambda-identity", "5", "--antialias-G", "--antialias-D"])],
    "spade": [("SPADE, 35 labels, no VGG", ["--labels", "35", "--lambda-vgg", "0"]),
              ("SPADE, 35 labels", ["--labels", "35", "--vgg", "random"])],
    "pix2pixsc": [("pix2pixSC", ["--labels", "35", "--vgg", "random"]),
                  ("pix2pixSC without VGG", ["--labels", "35", "--lambda-2", "0"])],
    "segin": [("SEGIN", ["--vgg", "random"])],
    "init": [("MUNIT without X-Y-X cycle", ["--method", "munit", "--lambda-cyc", "0"]),
             ("MUNIT", ["--method", "munit"]), ("INIT, 2 crops of 120", ["--objects", "2"]),
             ("INIT, 3 crops of 120", [])],
    "swapae": [("Swapping Autoencoder, 2 crops of 128", ["--size", "128", "--batch", "2"]),
               ("Swapping Autoencoder, 2 crops of 128, R1 in every step",
                ["--size", "128", "--batch", "2", "--R1-every", "1"])],
    "egscit": [("EGSC-IT", ["--vgg", "random"]),
               ("EGSC-IT, MNIST-Single, batch 8",
                ["--task", "mnist-single", "--size", "28", "--batch", "8", "--vgg", "random"])],
}


def random_batch(args, device):
    """[x, y] of noise (B, 3, size, size) in [-1, 1], laid out as in training."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    shape = (args.batch, 3, args.size, args.size)
    return [torch.rand(shape).mul(2).sub(1).to(device, memory_format=layout) for _ in "xy"]


def clip_batch(args, device):
    """A batch of noise for pix2pixsc.py, whose step takes lambda_1 in the place of a generator."""
    ids = torch.randint(args.labels, (args.batch, args.size, args.size))
    x = torch.nn.functional.one_hot(ids, args.labels).permute(0, 3, 1, 2).float().to(device)
    (z, exemplar), pair = random_batch(args, device), random_batch(args, device)
    return [x, z, x.flip(3), exemplar, *pair, torch.arange(args.batch, device=device) % 2 == 0]


def sketch_batch(args, device):
    """[x, y, y_seg, W] for SEGIN."""
    (x, y), W = random_batch(args, device), random_batch(args, device)[0]
    return [x, y, (y[:, :1] > 0).float(), W]


def labelled_batch(args, device):
    """[m, x] for spade.py: a one-hot map of noise and such a picture."""
    import spade
    x = random_batch(args, device)[0]
    labels = torch.randint(args.labels, (len(x), *x.shape[2:])).to(device)
    return [spade.one_hot(labels, x.new_zeros(len(x), int(args.edges), *x.shape[2:]), args), x]


def random_scenes(args, device):
    """[what `Scenes` of init.py gives, as noise]: pictures, objects, backgrounds of X and Y."""
    x, y = random_batch(args, device)
    o = torch.rand(args.batch, args.objects, 3, *[args.object_size] * 2).to(device) * 2 - 1
    return [[x, y, o, o, x, y][:6 if args.method == "init" else 2]]


BATCHES = {"init": random_scenes, "spade": labelled_batch, "pix2pixsc": clip_batch,
           "segin": sketch_batch}


def seconds(device, work):
    """Seconds that work() takes, until the device has finished it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def peak_mib(device):
    """Peak memory of this process in MiB; nan on Windows, which does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return float("nan")
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@torch.no_grad()
def ceiling(device, dtype):
    """TFLOP/s of the convolution named at the top: the best of five times eight."""
    n = 16 if device.type == "cuda" else 1  # enough to fill a GPU
    conv = torch.nn.Conv2d(256, 256, 3, padding=1, device=device, dtype=dtype)
    x = torch.randn(n, 256, 64, 64, device=device, dtype=dtype)
    conv, x = (t.to(memory_format=torch.channels_last) for t in (conv, x))
    best = min(seconds(device, lambda: [conv(x) for _ in range(8)]) for _ in range(5))
    return 8 * n * 2 * 256 * 256 * 9 * 64 * 64 / best / 1e12


def hardware(device):
    """Name of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # Linux
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return names[0] if names else "CPU"


class Step:
    """A script's training step on noise, in the process that imports it."""

    def __init__(self, script, flags):
        self.module = code = importlib.import_module(script)
        self.args = self.module.get_args(flags)
        self.device = importlib.import_module("common").pick_device(self.args.device)
        self.nets = self.module.build(self.args, self.device)
        if getattr(self.args, "lambda_sem", 0):  # CyCADA's f_S comes from another stage
            self.nets.f_S = code.task_model(self.args).to(self.device).eval().requires_grad_(False)
        make = getattr(self.module, "random_batch", BATCHES.get(script, random_batch))
        self.batch = make(self.args, self.device)
        rng = self.args.lambda_1 if make is clip_batch else torch.Generator().manual_seed(0)
        self.rng = [] if make is sketch_batch else [rng]  # its step draws nothing

    def run(self):
        return self.module.train_step(self.nets, *self.batch, self.args, *self.rng)

    def facts(self):
        """Everything but the seconds. Peak memory comes first: counting operations raises it."""
        row = {"mib": peak_mib(self.device), "tflop": None, "batch": self.args.batch}
        # the counter cannot look into compiled code, or below R1's gradient at a picture
        if not self.args.compile and getattr(self.args, "R1_every", 0) != 1:
            with contextlib.suppress(RuntimeError), FlopCounterMode(display=False) as counter:
                self.run()  # torch 2.11 cannot count below SinCUT's R1 either
                row["tflop"] = counter.get_total_flops() / 1e12
        nets = {k: net for k, net in vars(self.nets).items() if isinstance(net, torch.nn.Module)}
        dtype = torch.bfloat16 if self.args.amp else torch.float32
        return row | {"ceiling": ceiling(self.device, dtype), "hardware": hardware(self.device),
                      "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "params": {k: sum(p.numel() for p in nets[k].parameters()) for k in nets}}


def child(root, script, flags):
    """A process of one checkout: obeys 'step' and 'facts' on stdin, a line of JSON for each."""
    sys.path[0] = root  # in place of lab/, where this file lies
    answers, sys.stdout = sys.stdout, sys.stderr  # a script may print
    step = Step(script, flags)
    for order in sys.stdin:
        answer = seconds(step.device, step.run) if order == "step\n" else step.facts()
        print(json.dumps(answer), file=answers, flush=True)


def measure(roots, script, flags, steps):
    """A row (dict) for each checkout in `roots`, whose processes step in turn, the first time
    (compilation, allocation) unseen by the clock; ValueError if a process fails."""
    children = [subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps([str(root), script, flags])], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE) for root in roots]

    def ask_all(order):
        for process in children:
            print(order, file=process.stdin, flush=True)
            yield json.loads(process.stdout.readline())

    try:
        rounds = [list(ask_all("step")) for _ in range(steps + 1)][1:]
        rows = list(ask_all("facts"))
    except (BrokenPipeError, ValueError):  # a process has ended
        raise ValueError(f"{script}.py {' '.join(flags)}: failed, see above") from None
    finally:
        for process in children:
            process.kill()
            process.wait()
    return [row | {"root": str(root), "flags": flags, "seconds": s, "s": statistics.median(s)}
            for root, row, s in zip(roots, rows, zip(*rounds, strict=True), strict=True)]


def as_markdown(name, mode, rows, tflop):
    """One line of the table; `rows`: this checkout's row, and the other's if there is one."""
    row = rows[0]
    params = ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in row["params"].items())
    cells = [name, mode, f"{row['s']:.3g}", f"{row['batch'] / row['s']:.3g}", f"{row['mib']:.0f}",
             f"{tflop:.3f}" if tflop else "-", f"{tflop / row['s']:.3g}" if tflop else "-",
             params, f"{row['ceiling']:.3g}"]
    for other in rows[1:]:
        pairs = [a / b for a, b in zip(row["seconds"], other["seconds"], strict=True)]
        cells += [f"{other['s']:.3g}", ", ".join(f"{ratio:.2f}" for ratio in pairs),
                  f"{statistics.median(pairs):.2f}", f"{other['mib']:.0f}",
                  f"{row['mib'] / other['mib']:.2f}"]
    return f"| {' | '.join(cells)} |"


def main():
    p = argparse.ArgumentParser(prog="lab.bench", description=__doc__.split("\n")[0],
                                allow_abbrev=False)
    p.add_argument("scripts", nargs="*", help=f"which of: {', '.join(ROWS)} (all)")
    p.add_argument("--size", type=int, default=256, help="training crop in pixels")
    p.add_argument("--batch", type=int, default=1, help="pictures per step")
    p.add_argument("--steps", type=int, default=3, help="timed steps; the median is printed")
    modes = ["fp32", "amp", "compile", "amp+compile"]
    p.add_argument("--modes", nargs="+", choices=modes, default=["fp32"])
    p.add_argument("--device", help="cuda, mps or cpu")
    p.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help="NHWC memory")
    p.add_argument("--against", metavar="DIR", help="another checkout, stepped in turn")
    p.add_argument("--json", metavar="FILE", help="append each row, a line of JSON, to a file")
    args = p.parse_args()
    from common import UserError

    if unknown := set(args.scripts) - ROWS.keys():
        raise UserError(f"no such method: {', '.join(unknown)}; known: {', '.join(ROWS)}")
    roots = [ROOT] + ([Path(args.against).resolve()] if args.against else [])
    head = ("method | mode | s/step | pictures/s | peak MiB | TFLOP/step | TFLOP/s | parameters "
            "| ceiling TFLOP/s")
    head += " | other s/step | ratios | median ratio | other MiB | ratio" * bool(args.against)
    print(f"| {head} |\n{'|---' * (head.count('|') + 1)}|", flush=True)
    for script in args.scripts or ROWS:
        if missing := [root for root in roots if not (root / f"{script}.py").exists()]:
            print(f"{missing[0]} has no {script}.py: left out", file=sys.stderr)
            continue
        for name, flags in ROWS[script]:
            tflop = None
            for mode in args.modes:
                size = ["--size", str(args.size), "--batch", str(args.batch)]
                every = flags + ["--data", "."] + size * ("--size" not in flags)
                every += ["--amp"] * ("amp" in mode) + ["--compile"] * ("compile" in mode)
                every += ["--device", args.device] * bool(args.device)
                if args.channels_last is not None:
                    every += ["--channels-last" if args.channels_last else "--no-channels-last"]
                try:
                    rows = measure(roots, script, every, args.steps)
                except ValueError as error:
                    raise UserError(error) from None
                tflop = rows[0]["tflop"] or tflop  # the same arithmetic, compiled or not
                print(as_markdown(name, mode, rows, tflop), flush=True)
                if args.json:
                    with open(args.json, "a", encoding="utf-8") as f:
                        f.writelines(json.dumps({"name": name, "mode": mode} | row) + "\n"
                                     for row in rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*json.loads(sys.argv[2]))
    else:
        from common import entry

        entry(main)
