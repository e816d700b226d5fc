"""docs/RESULTS.md and README's table of methods, written from what lab/results holds.

    python -m lab.tables --write

TABLE/ROW-SEED.json is a measured row (lab.tables), bench.jsonl the rows of lab.bench --json, and
SCRIPT.md what the pictures show and what no table holds, by hand.
"""

import json
import re
from pathlib import Path

from common import UserError
from lab import tables, variants

ORDER = "cyclegan cut sincut spade pix2pixsc segin egscit init swapae cycada".split()
METHODS = {  # script: (method, paper, the data it needs, what the toy run shows)
    "cyclegan": ("CycleGAN", "Zhu, Park et al., ICCV 2017", "two unpaired folders",
                 "horses become zebras, stripes follow the body; pale skies"),
    "cut": ("CUT, FastCUT", "Park et al., ECCV 2020", "two unpaired folders",
            "the same with one generator; dots in the ground"),
    "sincut": ("SinCUT", "Park et al., ECCV 2020", "two pictures",
               "one horse wears one zebra's stripes"),
    "spade": ("SPADE ([pix2pixHD++](lab/rows/pix2pixhd.py))", "Park et al., CVPR 2019",
              "label maps and pictures", "a label map painted in any picture's style"),
    "pix2pixsc": ("pix2pixSC", "Wang et al., CVPR 2019", "clips with label maps",
                  "the map's animals in the exemplar's coat and light, blurred"),
    "segin": ("SEGIN", "Huang et al., 2019", "sketches and photos",
              "a sketch, each part in the reference's colour, somewhat paler"),
    "egscit": ("EGSC-IT", "Ma et al., ICLR 2019", "two unpaired folders",
               "digits in an exemplar's two colours; many strokes break up"),
    "init": ("INIT, MUNIT", "Shen et al., CVPR 2019", "two unpaired folders and boxes",
             "days become nights in a reference's or a random light; blurred"),
    "swapae": ("Swapping Autoencoder", "Park et al., NeurIPS 2020", "one folder",
               "layouts stay, colours of figure and ground change; speckle everywhere"),
    "cycada": ("CyCADA", "Hoffman et al., ICML 2018", "labelled source, unlabelled target",
               "graphics painted as photographs; better label maps of photographs"),
}
CEILINGS = ("oracle", "the truth", "true nights")  # made of what the method must do without


def measured(name):
    """The results of a table, as lists of records by row label, in the order of seeds."""
    found = {}
    for path in sorted(tables.Series(name).results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(record["row"], []).append(record)
    return {label: sorted(records, key=lambda r: r["seed"]) for label, records in found.items()}


def against_painters(records):
    """(score's name, its mean, (best painter, its value), do all seeds beat it) of a toy run's
    first score; painters are the answers that need no learning, and no answers of the target."""
    scores = [record["scores"][0] for record in records]
    lower = scores[0]["better"] == "lower"
    painters = [item for s in scores for item in s["trivial"].items() if item[0] not in CEILINGS]
    best = (min if lower else max)(painters, key=lambda item: item[1])
    if best[0].startswith("and "):  # of a list that goes on from its first painter
        best = f"mean colours {best[0]}", best[1]
    beaten = all((s["value"] < best[1]) == lower and s["value"] != best[1] for s in scores)
    return scores[0]["name"], sum(s["value"] for s in scores) / len(scores), best, beaten


def methods(lines):
    """README's table; lines: {script: how many it has}."""
    rows = ["| paper, in one file | data | what you see | lines | minutes | toy result; best "
            "painter |", "|---" * 6 + "|"]
    for script in ORDER:
        found = measured(f"{script}.toy")
        said, minutes = "not run", ""
        if found:
            records = next(iter(found.values()))
            name, value, (painter, other), beaten = against_painters(records)
            seeds = f"{len(records)} seeds" if records[1:] else "1 seed"
            said = (f"{name} {value:.3g} ({seeds}){'' if beaten else ', **no success**'}; "
                    f"{painter} {other:.3g}")
            minutes = f"{min(r['seconds'] for r in records) / 60:.0f}"
        method, paper, *seen = METHODS[script]
        rows.append(f"| [{script}.py]({script}.py) {method}, {paper} | {' | '.join(seen)} | "
                    f"{lines[script]} | {minutes} | {said} |")
    return "\n".join(rows)


def bench(path):
    """The rows of lab.bench --json as Markdown; the last of equal ones counts."""
    if not path.exists():
        return ""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["hardware"], row["threads"], row["name"], row["mode"]] = row
    lines = ["| hardware | threads | method | mode | s/step | peak MiB | TFLOP/step |",
             "|---" * 7 + "|"]
    lines += [f"| {' | '.join(map(str, key))} | {row['s']:.3g} | {row['mib']:.0f} | "
              f"{f'{tflop:.3f}' if (tflop := row['tflop']) else ''} |"
              for key, row in found.items()]
    return "\n".join(lines)


def results():
    """docs/RESULTS.md."""
    folder = variants.ROOT / "lab/results"

    def by_hand(name):
        return (folder / f"{name}.md").read_text(encoding="utf-8").strip()

    parts, verdicts, seconds = [], [], {}
    for script in ORDER:
        parts += [f"## {script}.py", by_hand(script)]
        for name, table in tables.TABLES.items():
            found = measured(name) if table.script == script else {}
            seconds |= {("gpu" in r, r["source"], r["seed"], *r["flags"]): r["seconds"]
                        for records in found.values() for r in records}  # equal rows count once
            if table.script != script:
                continue
            parts.append(f"### `python -m lab.tables {name}`")
            if not found:
                parts.append(f"{table.about}. Not run: {len(table.rows)} rows.")
                continue
            seeds = sorted({r["seed"] for records in found.values() for r in records})
            seeds = seeds if name.endswith(".toy") else [0, 1, 2]
            text = tables.markdown(tables.Series(name), seeds)
            if name.endswith(".toy"):
                score, _, (painter, value), beaten = against_painters(next(iter(found.values())))
                text += (f"- {'shows' if beaten else 'does not show'}: every seed beats every "
                         f"answer that needs no learning ({score}; the best is {painter}, "
                         f"{value:.3g})")
            verdicts += [f"- {name}: {said}" for said in re.findall(r"^- (.+)$", text, re.M)]
            parts.append(text)
    head = by_hand("intro")
    for word, gpu in (("GPU-HOURS", True), ("HOURS", False)):
        hours = sum(s for key, s in seconds.items() if key[0] == gpu) / 3600
        head = head.replace(word, f"{hours:.1f}")
    return "\n\n".join(["# Results", head, "## Which claims show", "\n".join(verdicts), *parts,
                        "## Speed and memory of one training step", by_hand("bench"),
                        bench(folder / "bench.jsonl")]) + "\n"


def pages():
    """{path: text} of the generated pages; `UserError` if README has no place for its table."""
    readme = variants.ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    lines = {s: len((variants.ROOT / f"{s}.py").read_text(encoding="utf-8").splitlines())
             for s in ORDER}
    marks = r"(<!-- python -m lab\.tables --write -->\n).*?(<!-- -->)"
    if len(re.findall(marks, text, re.DOTALL)) != 1:
        raise UserError("README.md: the marks around the table of methods are missing")
    table = methods(lines)
    text = re.sub(marks, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
    return {readme: text, Path(variants.ROOT, "docs/RESULTS.md"): results()}
