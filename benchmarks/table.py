"""Writes the measured tables of the README from the committed results.

python benchmarks/table.py        rewrites what stands between the `<!-- table: ... -->` marks of README.md
"""

import json
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"maml": "MAML", "fomaml": "FOMAML", "anil": "ANIL", "meta-sgd": "Meta-SGD", "boil": "BOIL"}


def omniglot() -> str:
    """Omniglot 5-way 1-shot: a row for each method, split and number of meta-steps; a cell for each seed."""
    rows = defaultdict(list)
    for path in sorted((RESULTS / "omniglot_5w1s").glob("*.json")):
        result = json.loads(path.read_text())
        config = result["config"]
        rows[config["split"], config["steps"], config["method"], config["outer_schedule"]].append(result)
    titles = (
        "method",
        "split",
        "meta-steps",
        "accuracy, each seed (95 % interval)",
        "mean",
        "episodes",
        "norm",
        "device",
        "minutes",
    )
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    order = list(NAMES)
    for (split, steps, method, schedule), results in sorted(rows.items(), key=lambda row: (*row[0][:2], order.index(row[0][2]))):
        results.sort(key=lambda result: result["seeds"])
        cells = ", ".join(f"{100 * r['mean']:.1f} ± {100 * r['interval95']:.1f}" for r in results)
        mean = sum(r["mean"] for r in results) / len(results)
        minutes = ", ".join(f"{r['minutes']:.0f}" for r in results)
        first = results[0]
        devices = ", ".join(dict.fromkeys(r["versions"]["device"] for r in results))
        measured = (cells, f"{100 * mean:.1f}", str(first["episodes"]), first["norm"], devices, minutes)
        lines.append(f"| {NAMES[method]} | {split} | {steps:,}{' (cosine)' * (schedule == 'cosine')} | {' | '.join(measured)} |")
    return "\n".join(lines)


def sinusoid() -> str:
    """Sine waves: test error after 1, 5 and 10 inner steps, a row a seed, and the paper's."""
    found = json.loads((RESULTS / "sinusoid.json").read_text())
    steps = list(found["paper"])
    lines = ["| run | " + " | ".join(f"after {step}" for step in steps) + " |", "|" + "---|" * (len(steps) + 1)]
    lines.append("| Finn et al. 2017 | " + " | ".join(f"{found['paper'][step]:.2f}" for step in steps) + " |")
    for run in found["runs"]:
        cells = (f"{run['by_step'][step]['mse']:.2f} ± {run['by_step'][step]['interval95']:.2f}" for step in steps)
        lines.append(f"| seed {run['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed() -> str:
    """Milliseconds of a MAML meta-gradient, jmeta and its peers: a row for each kind of work."""
    found = json.loads((RESULTS / "speed.json").read_text())
    names = list(dict.fromkeys(name for row in found.values() for name in row["contenders"]))
    lines = ["| work | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for work, row in found.items():
        cells = (_milliseconds(row["contenders"].get(name, {})) for name in names)
        lines.append(f"| {work} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _milliseconds(contender: dict) -> str:
    """Median, and fastest to slowest; a dash where it did not run."""
    if "seconds" not in contender:
        return "-"
    median, fastest, slowest = (1e3 * contender["seconds"][name] for name in ("median", "fastest", "slowest"))
    digits = 0 if median >= 100 else 1
    return f"{median:.{digits}f} ({fastest:.{digits}f} to {slowest:.{digits}f})"


def fill(text: str) -> str:
    """The README with every marked table as the results have it."""
    for make in (omniglot, sinusoid, speed):
        mark = f"<!-- table: {make.__name__} -->"
        text = re.sub(f"{mark}.*?{mark}", lambda _, make=make, mark=mark: f"{mark}\n{make()}\n{mark}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))
