"""The papers' tables, rerun: every row with several seeds, and a verdict on each of its claims.

    python -m lab.tables                          # the tables, and what there is of them
    python -m lab.tables cut.fig3.24 [--seeds 0 1 2] [--jobs 2] [--device cpu] [--quick] [--again]
    python -m lab.tables --write                  # docs/RESULTS.md and README's table of methods

A row is a variant of a script (lab/rows), trained in runs/tables/NAME/ROW-SEED. A result that is in
lab/results/NAME/ROW-SEED.json is not measured again, an interrupted run is continued. A claim is
judged by the table's score: "shows" if every seed of the better row beats every seed of the other,
"does not show" if the reverse, else "undecided". SCRIPT.toy is the script's own toy preset.
"""

import argparse
import ast
import hashlib
import itertools
import json
import math
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from common import UserError, entry, pick_device, write_whole
from lab import variants

MODELS = re.findall("model name.*: (.+)", Path("/proc/cpuinfo").read_text()
                    if sys.platform == "linux" else "")


@dataclass
class Row:
    """label: as the paper's table has it; paper: {column: what the paper reports}."""
    label: str
    variant: str | None = None
    flags: list = field(default_factory=list)
    paper: dict = field(default_factory=dict)


@dataclass
class Table:
    """flags: of all rows, --steps among them. claims: (better row, worse row, the paper's words,
    and the score that decides it where that is not the table's)."""
    script: str
    about: str
    rows: list
    score: str
    flags: list = field(default_factory=list)
    claims: list = field(default_factory=list)


BACKGROUND, OWN_PHOTO = "background error", "own photo as reference: VGG distance"
BANK = ["--bank", "4096"]  # keys of 64 pictures, as the paper's 16,384 are, with 64 places for 256
SEGMAP = ["--steps", "400", "--input", "segmap"]  # pix2pixHD++ has no use for a style
COMPACT, TOY_RATES = ["--ngf", "12"], ["--lr-G", "1e-3", "--lr-D", "1e-3"]  # geometric mean
TABLES = {
    "cycada.tab3.7": Table(
        "cycada", "Tab. 3.7 and the ICML paper's rows (paper: GTA5 -> Cityscapes, FCN8s)",
        score="mIoU", flags="--steps 600 --task-steps 300 --feature-steps 150".split(),
        rows=[Row("source only", "source_only", paper={"mIoU": 17.9}),
              Row("feature only", "feature_only", paper={"mIoU": 29.2}),
              Row("pixel only", "pixel_only", paper={"mIoU": 34.8}),
              Row("pixel feature", "pixel_feature", paper={"mIoU": 35.4}),
              Row("no cycle", "no_cycle"), Row("semantic", "semantic"), Row("term T", "semantic_T"),
              Row("term S", "semantic_S"), Row("oracle", "oracle", paper={"mIoU": 60.3})],
        claims=[("pixel only", "source only", "translated graphics teach better than graphics"),
                ("pixel only", "feature only", "pixels carry more of the gap than features"),
                ("pixel feature", "pixel only", "the two complement each other"),
                ("pixel only", "no cycle", "the cycle keeps what the labels say"),
                ("semantic", "pixel only", "Eq. (3.13) helps (an idea in the thesis, not run)")]),
    "cycada.long": Table("cycada", "the toy preset, seven times as long", [Row("default")], "mIoU",
                         ["--steps", "14000"]),
    "cyclegan.tab3.4": Table(
        "cyclegan", "Tab. 3.4: which terms of Eq. (3.3) are needed (paper: labels -> photo)",
        score="stripe direction error", flags=["--steps", "300"],
        rows=[Row("Cycle alone", "cycle_alone", paper={"class IoU": 0.02}),
              Row("GAN alone", "GAN_alone", paper={"class IoU": 0.08}),
              Row("GAN + forward cycle", "GAN_forward", paper={"class IoU": 0.12}),
              Row("GAN + backward cycle", "GAN_backward", paper={"class IoU": 0.06}),
              Row("CycleGAN", paper={"class IoU": 0.11})],
        claims=[("CycleGAN", "Cycle alone", "removing the GAN loss degrades results"),
                ("CycleGAN", "GAN alone", "so does removing the cycles", BACKGROUND),
                ("CycleGAN", "GAN + forward cycle", "one cycle is not enough", BACKGROUND),
                ("CycleGAN", "GAN + backward cycle", "one cycle is not enough", BACKGROUND)]),
    "cyclegan.tab3.1": Table(
        "cyclegan", "Tab. 3.1 to 3.3: what else than cycles keeps the content, and other losses",
        score=BACKGROUND, flags=["--steps", "300"],
        rows=[Row("CycleGAN", paper={"map -> photo, % real": 26.8}),
              Row("SimGAN", "simgan", paper={"map -> photo, % real": 0.7}),
              Row("Feature loss + GAN", "feature_loss", paper={"map -> photo, % real": 1.2}),
              Row("CycleGAN, Eq. (3.1) as printed", "log_loss"),
              Row("CycleGAN + L_identity (Fig. 3.9)", "identity")],
        claims=[("CycleGAN", "SimGAN", "cycles do better than |x - G(x)|_1"),
                ("CycleGAN", "Feature loss + GAN", "cycles do better than a feature loss"),
                ("CycleGAN", "CycleGAN, Eq. (3.1) as printed", "least squares do better"),
                ("CycleGAN + L_identity (Fig. 3.9)", "CycleGAN", "L_identity keeps colours")]),
    "cut.fig3.24": Table(
        "cut", "Fig. 3.24: what the contrastive loss needs (paper: horse -> zebra)",
        score="stripe direction error", flags=["--steps", "300"],
        rows=[Row("CUT", paper={"FID": 45.5}), Row("no id", "no_id"),
              Row("no id, 15 neg", "no_id_15_neg"), Row("last", "last"),
              Row("int and ext", "int_and_ext", BANK), Row("ext only", "external", BANK),
              Row("ext only, last", "external_last", BANK)],
        claims=[("CUT", "ext only", "internal negatives are more effective than external ones"),
                ("CUT", "ext only", "internal negatives preserve the content better", BACKGROUND),
                ("CUT", "int and ext", "external negatives hurt also as an addition"),
                ("CUT", "last", "using the encoder's last layer alone hurts"),
                ("CUT", "last", "one layer preserves less of the content", BACKGROUND)]),
    "cut.additional": Table(
        "cut", "additional ablations of Sec. 3.3.2, and FastCUT (paper: horse -> zebra)",
        score="stripe direction error", flags=["--steps", "300"],
        rows=[Row("CUT", paper={"FID": 46.6}),
              Row("encoders not shared", "encoders_apart", paper={"FID": 50.5}),
              Row("no NCE gradient to G_dec", "decoder_unmoved", paper={"FID": 444.2}),
              Row("FastCUT", "fastcut", paper={"FID": 73.4})],
        claims=[("CUT", "encoders not shared", "sharing the encoder helps"),
                ("CUT", "no NCE gradient to G_dec", "G_dec must learn from PatchNCE", BACKGROUND),
                ("CUT", "FastCUT", "the identity term gives better pictures")]),
    "sincut.variants": Table(
        "sincut", "Sec. 3.3.2: R1, and the code's |G(y) - y|", flags=["--steps", "1000"],
        rows=[Row("SinCUT"), Row("without R1", "no_R1"), Row("without |G(y) - y|", "no_identity")],
        score="stripe direction error",
        claims=[("SinCUT", "without R1", "R1 holds a D that sees a single picture")]),
    "swapae.fig4.6": Table(
        "swapae", "Fig. 4.6 (right): the largest crop of D_patch, as a share of the side",
        score="motif right", flags=["--steps", "500"],
        rows=[Row("1/8", "crop_1_8"), Row("1/4 (default)"), Row("1/2", "crop_1_2"),
              Row("3/4", "crop_3_4"), Row("without D_patch", "no_cooccurrence")],
        claims=[("3/4", "1/8", "larger patches bring the texture closer"),
                ("1/8", "3/4", "larger patches change more of the structure", "outline error"),
                ("1/4 (default)", "without D_patch", "D_patch makes the code mean texture")]),
    "pix2pixsc.tab4": Table(
        "pix2pixsc", "Tab. 4, and the baseline of Tab. 1 (paper: sketch -> face)",
        score="style error", flags=["--steps", "1000"],
        rows=[Row("pix2pixSC", paper={"FID": 31.26}),
              Row("w/o adaptive weights", "not_adaptive", paper={"FID": 35.59}),
              Row("w/o L_SCAdv", "no_L_SCAdv", paper={"FID": 58.08}),
              Row("w/o L_SC", "no_L_SC", paper={"FID": 76.59}),
              Row("pix2pixHD", "pix2pixHD", paper={"FID": 39.86})],
        claims=[("pix2pixSC", "w/o adaptive weights", "adaptive weights improve style"),
                ("pix2pixSC", "w/o L_SCAdv", "without L_SCAdv the style is not maintained"),
                ("pix2pixSC", "w/o L_SC", "without L_SC the content is lost",
                 "detail correlation"),
                ("pix2pixSC", "pix2pixHD", "pix2pixHD does not keep the exemplar's style"),
                ("pix2pixHD", "pix2pixSC", "but it keeps the labels best",
                 "detail correlation")]),
    "segin.tab2": Table(
        "segin", "Tab. II: what is left out; Fig. 10: other matchers (paper: edges -> shoes)",
        score="parts right", flags=["--steps", "300"],
        rows=[Row("w/o GAN", "no_gan", paper={"FID": 55.618, "LPIPS (gt)": 0.112}),
              Row("w/o L_recon", "no_recon", paper={"FID": 59.162, "LPIPS (gt)": 0.121}),
              Row("w/o L_F", "no_F", paper={"FID": 76.554, "LPIPS (gt)": 0.147}),
              Row("w/o L_tv", "no_tv", paper={"FID": 58.181, "LPIPS (gt)": 0.111}),
              Row("w/o NL", "no_nl", paper={"FID": 72.387, "LPIPS (gt)": 0.132}),
              Row("w/o MT", "no_mt", paper={"FID": 77.211, "LPIPS (gt)": 0.144}),
              Row("SEGIN", paper={"FID": 54.514, "LPIPS (gt)": 0.112}),
              Row("N (PNN), Fig. 10", "pixelnn"), Row("N (same place)", "same_place")],
        claims=[("SEGIN", "w/o GAN", "the GAN loss makes pictures real", OWN_PHOTO),
                ("SEGIN", "w/o L_recon", "without L_recon colours differ", "part colour error"),
                ("SEGIN", "w/o L_F", "without L_F there are severe artifacts", OWN_PHOTO),
                ("SEGIN", "w/o L_tv", "L_tv matters less, and helps", OWN_PHOTO),
                ("SEGIN", "w/o NL", "non-local layers carry colours to where W has none"),
                ("SEGIN", "w/o MT", "the mask keeps edges clean", "picture error"),
                ("SEGIN", "N (PNN), Fig. 10", "the semantic match is the best"),
                ("SEGIN", "N (same place)", "so it is beside no match at all")]),
    "spade.tab2.3": Table(
        "spade", "Tab. 2.3: SPADE against concatenation, in two architectures (paper: COCO-Stuff)",
        score="mIoU", flags=["--steps", "1000", *SEGMAP[2:]],
        rows=[Row("decoder w/ SPADE", paper={"mIoU": 35.2}),
              Row("compact decoder w/ SPADE", None, COMPACT, {"mIoU": 35.2}),
              Row("decoder w/ Concat", "concat", paper={"mIoU": 31.9}),
              Row("pix2pixHD++ w/ SPADE", "hd_spade", paper={"mIoU": 34.4}),
              Row("pix2pixHD++ w/ Concat", "hd_concat", paper={"mIoU": 32.9}),
              Row("pix2pixHD++", "hd", paper={"mIoU": 32.7}),
              Row("compact pix2pixHD++", "hd", COMPACT, {"mIoU": 31.6}),
              Row("pix2pixHD itself", "pix2pixhd", TOY_RATES, {"mIoU": 14.6})],
        claims=[("decoder w/ SPADE", "decoder w/ Concat", "SPADE outperforms concatenation"),
                ("pix2pixHD++ w/ SPADE", "pix2pixHD++ w/ Concat", "and in pix2pixHD++"),
                ("decoder w/ SPADE", "pix2pixHD++", "the decoder beats the strong baseline"),
                ("compact decoder w/ SPADE", "pix2pixHD++", "with fewer parameters, too"),
                ("pix2pixHD++", "pix2pixHD itself", "which beats pix2pixHD")]),
    "spade.tab2.4": Table(
        "spade", "Tab. 2.4: variations of SPADE (paper: COCO-Stuff)", score="mIoU", flags=SEGMAP,
        rows=[Row("segmap input, 3x3, BatchNorm", paper={"mIoU": 35.2}),
              Row("random input", "random", paper={"mIoU": 35.3}),
              Row("kernel size 5x5", "kernel_5", paper={"mIoU": 35.0}),
              Row("kernel size 1x1", "kernel_1", paper={"mIoU": 32.7}),
              Row("more parameters (141M)", None, ["--ngf", "20"], {"mIoU": 35.3}),
              Row("fewer parameters (61M)", None, COMPACT, {"mIoU": 35.2}),
              Row("InstanceNorm", "instance_norm", paper={"mIoU": 33.9})],
        claims=[("segmap input, 3x3, BatchNorm", "kernel size 1x1", "1x1 hurts performance"),
                ("segmap input, 3x3, BatchNorm", "InstanceNorm", "(the table alone)")]),
    "spade.tab2.5": Table(
        "spade", "Tab. 2.5: losses, and the parts of pix2pixHD++ (paper: COCO-Stuff)",
        score="mIoU", flags=SEGMAP,
        rows=[Row("Ours", paper={"mIoU": 35.2}),
              Row("w/o perceptual loss", "no_vgg", paper={"mIoU": 24.7}),
              Row("w/o feature matching", "no_fm", paper={"mIoU": 33.2}),
              Row("deeper discriminator", None, ["--d-layers", "4"], {"mIoU": 34.9}),
              Row("pix2pixHD++", "hd", paper={"mIoU": 32.7}),
              Row("pix2pixHD++ w/o Sync BatchNorm", "hd_no_sync", paper={"mIoU": 27.4}),
              Row("and w/o Spectral Norm", "hd_no_sync_no_spectral", paper={"mIoU": 26.0})],
        claims=[("Ours", "w/o perceptual loss", "the perceptual loss is important"),
                ("Ours", "w/o feature matching", "so is feature matching"),
                ("Ours", "deeper discriminator", "a deeper discriminator does not help"),
                ("pix2pixHD++", "pix2pixHD++ w/o Sync BatchNorm", "batch norm helps")]),
    "egscit.tab2": Table(
        "egscit", "Tab. 2 (paper: MNIST, SSIM to the *exemplar*)", score="x_AB: SSIM to the truth",
        flags="--ngf 16 --lr 1e-3 --lambda-KL 0.1 --steps 800 --pretrain 300".split(),
        rows=[Row("UNIT", "unit", paper={"A to B": 0.178, "B to A": 0.074}),
              Row("without feature mask", "no_mask", paper={"A to B": 0.395, "B to A": 0.133}),
              Row("without AdaIN", "no_adain", paper={"A to B": 0.208, "B to A": 0.080}),
              Row("without L_P", "no_L_P", paper={"A to B": 0.286, "B to A": 0.093}),
              Row("EGSC-IT", paper={"A to B": 0.478, "B to A": 0.232}),
              Row("EGSC-IT, AdaIN of the code", "released_adain")],
        claims=[("EGSC-IT", row, words, f"x_{way}: SSIM to the truth") for row, words in (
            ("without feature mask", "masks keep figure and ground apart"),
            ("without AdaIN", "AdaIN carries the exemplar's style"),
            ("without L_P", "L_P teaches which colour belongs where"),
            ("UNIT", "all three together")) for way in ("AB", "BA")]),
    "egscit.fig6": Table(
        "egscit", "Fig. 6: boards of ten digits, each class in its colour", flags=(
            "--data toy-multiple --ngf 8 --lr 1e-3 --lambda-c 30 --lambda-s 3000 --batch 2 "
            "--steps 400 --pretrain 200").split(), score="x_AB: SSIM to the truth",
        rows=[Row("EGSC-IT"), Row("without feature mask", "no_mask")],
        claims=[("EGSC-IT", "without feature mask", "masks keep ten things apart",
                 f"x_{way}: SSIM to the truth") for way in ("AB", "BA")]),
    "init.munit": Table(
        "init", "Tab. 3: INIT and MUNIT (paper: sunny -> night, rainy, cloudy)",
        score="object diversity", flags=["--steps", "400"],
        rows=[Row("INIT w/ Ds", paper={"LPIPS diversity": 0.274}),
              Row("INIT w/o Ds", "without_Ds", paper={"LPIPS diversity": 0.246}),
              Row("MUNIT", "munit", paper={"LPIPS diversity": 0.247}),
              Row("MUNIT, twice the steps", "munit", ["--steps", "800"]),
              Row("INIT, multi-scale", "multi_scale"), Row("INIT, Sg for z", "Sg_for_z")],
        claims=[("INIT w/ Ds", "MUNIT", "objects are more diverse"),
                ("INIT w/ Ds", "INIT w/o Ds", "a shared discriminator is better"),
                ("INIT w/ Ds", "MUNIT, twice the steps", "objects are truer", "object error")]),
}
TABLES["egscit.mnist"] = replace(
    TABLES["egscit.tab2"], about="Tab. 2, MNIST itself (datasets/MNIST/raw; the drawn digits' phi)",
    flags=["--data", "mnist-single", "--small", *TABLES["egscit.tab2"].flags])
TABLES = {f"{script}.toy": Table(script, "the toy preset", [Row("default")], "") for script in [
    *dict.fromkeys(table.script for table in TABLES.values()), "sincut"]} | TABLES


def without_words(text):
    """A script, or the blocks of common.py, less imports, comments and docstrings: what a result
    hangs on."""
    tree = ast.parse(text.split("\n# ==== 2. Pictures")[0])
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                body[0].value, ast.Constant):
            body[0].value.value = ""
    return ast.unparse(tree)


class Series:
    """The runs of a table, and where they are kept; `UserError` if there is no such table."""

    def __init__(self, name, quick=False, device="cpu"):
        if name not in TABLES:
            raise UserError(f"no table {name!r}, found {', '.join(TABLES)}")
        self.name, self.table, self.device = name, (table := TABLES[name]), ["--device", device]
        self.folder = Path("runs/tables", f"{name}-quick" if quick else name)
        self.results = self.folder if quick else variants.ROOT / "lab/results" / name
        self.shared, self.children, self.stopped, self.again = [*table.flags], set(), False, False
        for i, flag in enumerate(self.shared if quick else ()):
            if flag.endswith("steps"):
                self.shared[i + 1] = str(max(1, int(self.shared[i + 1]) // 10))

    def files(self, row, seed):
        """(result, log) of a row and a seed; the run folder is the log's name without suffix."""
        name = f"{re.sub(r'[^A-Za-z0-9]+', '_', row.label).strip('_')}-{seed}"
        return self.results / f"{name}.json", self.folder / f"{name}.log"

    def source(self, row):
        """(12 digits that stand for the row's code, its flags); `UserError` if a patch is stale."""
        texts, own = variants.sources(self.table.script, row.variant)
        code = "".join(without_words(text) for text in texts.values())
        return hashlib.sha256(code.encode()).hexdigest()[:12], [*self.shared, *own, *row.flags]

    def measure(self, row, seed):
        """Train a row with a seed and write its result. Returns None, or why there is none."""
        if self.stopped:
            return "stopped"
        (source, flags), (path, log) = self.source(row), self.files(row, seed)
        for other in self.results.parent.glob(f"{self.table.script}.*/*-{seed}.json"):
            record = json.loads(other.read_text())
            if other != path and not self.again and [record["source"], record["flags"]] == [
                    source, flags + self.device]:  # the same run, of another row or table
                record |= {"table": self.name, "row": row.label}
                return write_whole(path, json.dumps(record, indent=1) + "\n")
        key, out = f"{source} {shlex.join(flags)}\n", log.parent / log.stem
        known = log.exists() and log.read_text(errors="replace").startswith(key)
        if not known:  # what is there is of other code or flags: not to be continued
            out.mkdir(parents=True, exist_ok=True)
            for stale in [*out.rglob("last.pt"), *out.rglob("result.json")]:
                stale.unlink()
            log.write_text(key)
        given = [*row.flags, *self.device, "--seed", str(seed), "--out", str(out)]
        given += ["--resume"] if known and any(out.rglob("last.pt")) else []
        with tempfile.TemporaryDirectory() as folder, open(log, "ab") as output:
            child = variants.start(
                self.table.script, row.variant, given, folder, self.shared,
                {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True)  # Ctrl-C comes from `stop` alone
            self.children.add(child)
            if self.stopped:
                child.send_signal(signal.SIGINT)
            code = child.wait()
            self.children.discard(child)
        if code or not (out / "result.json").exists():
            lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())[-5:]
            return "\n".join([f"exit code {code}, {log} ends in:", *lines])
        result = json.loads((out / "result.json").read_text())
        scores = [{k: s[k] for k in ("name", "value", "better")} | {"trivial": s.get("trivial", {})}
                  for s in result["scores"]]
        record = {"table": self.name, "row": row.label, "seed": seed, "flags": flags + self.device,
                  "steps": result["steps"], "seconds": result["seconds"], "scores": scores,
                  "source": source, "torch": torch.__version__, "threads": 1,
                  "cpu": MODELS[0] if MODELS else platform.processor() or platform.machine()}
        if self.device[1].startswith("cuda"):
            record["gpu"] = torch.cuda.get_device_name(self.device[1])
        write_whole(path, json.dumps(record, indent=1) + "\n")

    def stop(self, number, _):
        """Hand a signal on: the running scripts save, and no more are started."""
        self.stopped = True
        for child in list(self.children):
            child.send_signal(number)

    def measure_all(self, seeds, jobs, again=False):
        """Measure what is missing, all rows with the first seed first; the number of failures."""
        self.again, every = again, [(row, seed) for seed in seeds for row in self.table.rows]
        for row in self.table.rows:
            self.source(row)  # a patch that no longer applies is told before hours of training
        for path in [path for pair in every for path in self.files(*pair)] if again else ():
            path.unlink(missing_ok=True)
        left, failures = [pair for pair in every if not self.files(*pair)[0].exists()], 0
        before = {n: signal.signal(n, self.stop) for n in (signal.SIGINT, signal.SIGTERM)}
        with (ThreadPoolExecutor(max(1, jobs)) as pool, tqdm(
                total=len(every), initial=len(every) - len(left), unit="run", smoothing=0) as bar):
            waiting = runs = {pool.submit(self.measure, *pair): pair for pair in left}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    error, (row, seed) = future.exception() or future.result(), runs[future]
                    if error and not self.stopped:
                        bar.write(f"{row.label}, seed {seed}: {error}", file=sys.stderr)
                        failures += 1
                    bar.update(error is None)
        for number, handler in before.items():
            signal.signal(number, handler)
        if self.stopped:
            print("stopped; the same command goes on", file=sys.stderr)
            raise KeyboardInterrupt
        return failures


def verdict(better, worse, direction):
    """Do the values of one row beat the other's? direction: 'lower' or 'higher' is better."""
    gains = [b - a if direction == "lower" else a - b for a in better for b in worse]
    return ("not run" if not gains else "shows" if all(gain > 0 for gain in gains) else
            "does not show" if all(gain < 0 for gain in gains) else "undecided")


def markdown(series, seeds):
    """The table and the verdicts on its claims, as Markdown."""
    table = series.table
    found = {row.label: [json.loads(path.read_text()) for seed in seeds
                         if (path := series.files(row, seed)[0]).exists()] for row in table.rows}
    scores = [s for results in found.values() for r in results for s in r["scores"]]
    directions = {s["name"]: s["better"] for s in scores}
    columns = list(dict.fromkeys(column for row in table.rows for column in row.paper))

    def values(label, score):
        return [s["value"] for r in found[label] for s in r["scores"] if s["name"] == score]

    def line(label, numbers, paper):
        cells = [f"{sum(v) / len(v):.3g}" + (f" ({min(v):.3g} to {max(v):.3g})" if v[1:] else "")
                 if v else "" for v in numbers]
        return f"| {' | '.join([label, *cells, *(str(paper.get(c, '')) for c in columns)])} |"

    heads = [*(f"{name} ({better})" for name, better in directions.items()),
             *(f"paper: {column}" for column in columns)]
    command = shlex.join([f"{table.script}.py", *series.shared])
    on = " and ".join(sorted({r.get("gpu", "CPU") for rs in found.values() for r in rs})) or "CPU"
    lines = [f"{series.name}, {table.about}: {command}, seeds {' '.join(map(str, seeds))}, {on}, "
             "mean (least to most); (lower), (higher): which is better", "",
             f"| {' | '.join(['row', *heads])} |", "|---" * (1 + len(heads)) + "|"]
    for row in table.rows:
        n = len(found[row.label])
        note = "" if n == len(seeds) else f" ({n} of {len(seeds)} seeds)" if n else " (not run)"
        lines.append(line(row.label + note, [values(row.label, s) for s in directions], row.paper))
    for answer in dict.fromkeys(answer for s in scores for answer in s["trivial"]):
        numbers = [sorted({s["trivial"][answer] for s in scores if s["name"] == name
                           and answer in s["trivial"]}) for name in directions]
        lines.append(line(answer, numbers, {}))
    lines.append("")
    for better, worse, words, *other in table.claims:
        score = other[0] if other else table.score
        pair = [v if len(v := values(label, score)) == len(seeds) else []
                for label in (better, worse)]
        said = verdict(*pair, directions.get(score))
        odds = f", by chance 1 in {math.comb(2 * len(seeds), len(seeds))}" if "show" in said else ""
        lines.append(f"- {said}{odds}: {words} ({better} before {worse}, {score})")
    stale = [f"{row.label} seed {r['seed']}" for row in table.rows for r in found[row.label]
             if (r["source"], r["flags"][:-2]) != series.source(row)]
    lines += [f"\nMeasured with other code or flags than today's: {', '.join(stale)}"] * bool(stale)
    return "\n".join(lines)


def overview():
    """The tables: rows, the seeds that are there, hours that they took and that the rest will, by
    the toy run's time per step."""
    def results(name):
        return [json.loads(p.read_text()) for p in sorted(Series(name).results.glob("*.json"))]

    for name, table in TABLES.items():
        own = f"{table.script}.toy"
        found, toy = results(name), results(own) if own in TABLES else []
        hours = sum(r["seconds"] for r in found) / 3600
        print(f"{name}  {table.about}; {len(found)} results, {hours:.1f} hours", end="")
        if toy and (left := 3 * len(table.rows) - len(found)) > 0:
            whole = min(r["seconds"] for r in toy) / 3600
            steps = dict(itertools.pairwise(table.flags)).get("--steps", toy[0]["steps"])
            print(f"; {left} of three seeds are left, about "
                  f"{left * whole * int(steps) / toy[0]['steps']:.1f} hours", end="")
        print()
        for row in table.rows:
            seeds = [str(r["seed"]) for r in found if r["row"] == row.label]
            print(f"    {row.label}: {'seeds ' + ' '.join(seeds) if seeds else 'not run'}")


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m lab.tables", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", help="which table; all are listed if not given")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--device", help="as the scripts take it")
    p.add_argument("--quick", action="store_true", help="a tenth of the steps, kept in runs/")
    p.add_argument("--again", action="store_true", help="forget first what is there of these seeds")
    p.add_argument("--write", action="store_true", help="the pages that are made of the results")
    args = p.parse_args(argv)
    if args.write:
        from lab import report  # which itself needs this module

        for path, text in report.pages().items():
            path.write_text(text, encoding="utf-8")
        return None
    if args.name is None:
        return overview()
    series = Series(args.name, args.quick, args.device or pick_device().type)
    failures = series.measure_all(args.seeds, args.jobs, args.again)
    print(markdown(series, args.seeds))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    entry(main)
