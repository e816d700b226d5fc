"""Seconds, memory and arithmetic of one training step of every method, side by side.

    python bench.py                                        # all methods on this machine
    python bench.py cut --size 256 --batch 1 --steps 3     # one script: CUT, FastCUT, SinCUT
    python bench.py cut --modes fp32 amp amp+compile --device cuda

The timed thing is the `train_step` that training uses, at full width, on pictures of noise. Every
row is a process of its own, so that peak memory is its own: the resident set on the CPU (Python
and torch included), CUDA's peak allocation on a GPU. The last column is the speed of a large
float32 (or, with amp, bfloat16) matrix product in the same process, a ceiling for TFLOP/s.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

import common

# script -> rows: a name, and flags; rows that set --size themselves ignore bench's --size, --batch
ROWS = {
    "cut": [("CUT", []), ("FastCUT", ["--mode", "fastcut"]),
            ("SinCUT, 16 crops of 64", ["--mode", "sincut", "--size", "64"]),
            ("SinCUT, 16 crops of 128", ["--mode", "sincut", "--size", "128"])],
    "cycada": [("CyCADA, stage pixel", []),
               ("CyCADA, stage pixel, Eq. (3.13) by FCN8s",
                ["--semantic", "literal", "--task-weights", "random"])],
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
             ("MUNIT", ["--method", "munit"]), ("INIT, 2 crops of 120", []),
             ("INIT, 2 crops of 128", ["--object-size", "128"])],
    "swapae": [("Swapping Autoencoder, 2 crops of 128", ["--size", "128", "--batch", "2"]),
               ("Swapping Autoencoder, 2 crops of 128, R1 in every step",
                ["--size", "128", "--batch", "2", "--R1-every", "1"])],
    "egscit": [("EGSC-IT", ["--vgg", "random"]),
               ("EGSC-IT, MNIST-Single, batch 8",
                ["--task", "mnist-single", "--size", "28", "--batch", "8", "--vgg", "random"])],
}
MODES = ("fp32", "amp", "compile", "amp+compile")


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(device):
    """Peak memory of this process in MiB, or nan where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def matmul_tflops(device, dtype, n=4096):
    """TFLOP/s of the best of five n x n matrix products."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        a @ a
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e12


def measure(script, flags, steps):
    """One row as a dict; runs in this process. The first step (untimed) counts the operations."""
    module = importlib.import_module(script)
    args = module.get_args(flags)
    device = common.pick_device(args.device)
    m = module.build(args, device)
    batch = module.random_batch(args, device)
    rng = torch.Generator().manual_seed(0)
    # the operation counter cannot look into compiled code, or below R1's gradient at a picture
    if args.compile or getattr(args, "R1_every", 0) == 1:
        module.train_step(m, *batch, args, rng)
        flops = None
    else:
        with FlopCounterMode(display=False) as counter:
            module.train_step(m, *batch, args, rng)
        flops = counter.get_total_flops()
    module.train_step(m, *batch, args, rng)
    seconds = []
    for _ in range(steps):
        synchronise(device)
        start = time.perf_counter()
        module.train_step(m, *batch, args, rng)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    params = {name: sum(p.numel() for p in part.parameters())
              for name, part in vars(m).items() if isinstance(part, torch.nn.Module)}
    return {"s": median, "pictures": args.batch / median, "mib": peak_mib(device),
            "tflop": flops and flops / 1e12, "params": params,
            "ceiling": matmul_tflops(device, torch.bfloat16 if args.amp else torch.float32)}


def main():
    p = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0], allow_abbrev=False)
    p.add_argument("scripts", nargs="*", help=f"which of: {', '.join(ROWS)} (all)")
    p.add_argument("--size", type=int, default=256, help="training crop in pixels")
    p.add_argument("--batch", type=int, default=1, help="pictures per step")
    p.add_argument("--steps", type=int, default=3, help="timed steps; the median is printed")
    p.add_argument("--modes", nargs="+", choices=MODES, default=["fp32"])
    p.add_argument("--device", default=None, help="cuda, mps or cpu")
    p.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--measure", help=argparse.SUPPRESS)  # a row, as JSON, in a child process
    args = p.parse_args()
    if args.measure:
        print(json.dumps(measure(*json.loads(args.measure))))
        return
    if unknown := set(args.scripts) - ROWS.keys():
        raise common.UserError(f"no such method: {', '.join(unknown)}; known: {', '.join(ROWS)}")
    print("| method | mode | s/step | pictures/s | peak MiB | TFLOP/step | TFLOP/s "
          "| parameters | matmul TFLOP/s |\n|---|---|---|---|---|---|---|---|---|", flush=True)
    for script in args.scripts or ROWS:
        for name, flags in ROWS[script]:
            flops = None
            for mode in args.modes:
                flags_all = flags + ["--data", "."]
                if "--size" not in flags:
                    flags_all += ["--size", str(args.size), "--batch", str(args.batch)]
                flags_all += ["--amp"] * ("amp" in mode) + ["--compile"] * ("compile" in mode)
                flags_all += ["--device", args.device] * bool(args.device)
                flags_all += ["--no-channels-last"] * (not args.channels_last)
                child = subprocess.run(
                    [sys.executable, __file__, "--measure",
                     json.dumps([script, flags_all, args.steps])], stdout=subprocess.PIPE)
                if child.returncode:
                    raise common.UserError(f"{name}, {mode}: failed, see above")
                row = json.loads(child.stdout.splitlines()[-1])
                flops = row["tflop"] or flops  # the same arithmetic, compiled or not
                params = ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in row["params"].items())
                print(f"| {name} | {mode} | {row['s']:.3g} | {row['pictures']:.3g} "
                      f"| {row['mib']:.0f} | "
                      + (f"{flops:.3f} | {flops / row['s']:.3g}" if flops else "- | -")
                      + f" | {params} | {row['ceiling']:.3g} |", flush=True)


if __name__ == "__main__":
    common.entry(main)
