"""Writes the measured tables of the READMEs from the committed results.

python benchmarks/table.py        rewrites what stands between the `<!-- table: ... -->` marks of README.md and benchmarks/README.md
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jmeta.evaluate.draws import interval

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
NAMES = {"maml": "MAML", "fomaml": "FOMAML", "anil": "ANIL", "meta-sgd": "Meta-SGD", "boil": "BOIL", "sparse": "sparse-MAML"}
NAMES |= {"nrml": "NRML", "fonrml": "FONRML"}
CHANGED = {  # of NRML
    "": "nothing",
    "signed": "signed scales are compared",
    "global": "channels compete over all layers",
    "task": "channels are chosen once, as the task begins",
    "meta": "a task's meta-gradient holds its chosen filters alone",
    "spread": "scales start between 0.5 and 1.5, at random",
    "free": "the first step trains every channel",
    "apart": "scales adapt at ten times the rate",
    "lot": "channels are drawn by lot at each step",
    "fixed": "channels are drawn once for all tasks",
}
ZAPPED = {"iid": "i.i.d.", "iid-zap": "i.i.d., zapped", "asb": "ASB", "asb-zap": "ASB, zapped"}
FLOOR, FLOOR_FILTERS = 0.85, 64  # of ASB, zapped, frozen, 10 classes, without which the table of zapping does not count
ZAPPED |= {"meta-asb": "Meta-ASB", "meta-asb-zap": "Meta-ASB, zapped", "oml": "OML", "anml": "ANML"}


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
    lines = _head(titles)
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
    lines = _head(["run", *(f"after {step}" for step in steps)])
    lines.append("| Finn et al. 2017 | " + " | ".join(f"{found['paper'][step]:.2f}" for step in steps) + " |")
    for run in found["runs"]:
        lines.append(f"| seed {run['seed']} | {_errors(run['by_step'], steps)} |")
        if run["diverged"]:
            waves = f"without {run['diverged']} of {run['episodes']:,} waves, on which the inner steps diverge"
            lines.append(f"| seed {run['seed']} {waves} | {_errors(run['by_step_others'], steps)} |")
    return "\n".join(lines)


def _errors(by_step: dict, steps: list[str]) -> str:
    digits = [".2f" if by_step[step]["mse"] < 100 else ".0e" for step in steps]
    cells = zip((by_step[step] for step in steps), digits, strict=True)
    return " | ".join(f"{each['mse']:{form}} ± {each['interval95']:{form}}" for each, form in cells)


def speed() -> str:
    """Milliseconds of jmeta and its peers: a row for each kind of work."""
    found = json.loads((RESULTS / "speed.json").read_text())
    names = list(dict.fromkeys(name for row in found.values() for name in row["contenders"]))
    lines = _head(["work", *names])
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


def reach() -> str:
    """What jmeta makes of the machine, and how far it is ahead of the best PyTorch peer: a row for each kind of work."""
    titles = (
        "work",
        "GFLOP",
        "tasks/s",
        "of the product's rate",
        "of the roofline",
        "best peer in PyTorch",
        "JAX as people write it",
    )
    lines = _head(titles)
    for work, row in json.loads((RESULTS / "speed.json").read_text()).items():
        ratios = dict(row["ratios"])
        plain = ratios.pop("jax plain", None)
        best = min(ratios, key=ratios.__getitem__)
        cells = (
            f"{row['operations'] / 1e9:.3g}",
            f"{row['tasks_per_second']:.3g}",
            f"{100 * row['share_of_rate']:.0f} %",
            f"{100 * row['share_of_roofline']:.0f} %" if "share_of_roofline" in row else "-",
            f"{ratios[best]:.2f}x ({best})",
            "-" if plain is None else f"{plain:.2f}x",
        )
        lines.append(f"| {work} | {' | '.join(cells)} |")
    return "\n".join(lines)


def needs() -> str:
    """Seconds of the first call, and MiB at most of a later one: a row for each kind of work."""
    found = json.loads((RESULTS / "speed.json").read_text())
    names = list(dict.fromkeys(name for row in found.values() for name in row["contenders"]))
    lines = _head(["work", *names])
    for work, row in found.items():
        each = (row["contenders"].get(name, {}) for name in names)
        cells = (f"{one['first_call_seconds']:.1f} s, {one['peak_mib']:.0f} MiB" if "seconds" in one else "-" for one in each)
        lines.append(f"| {work} | {' | '.join(cells)} |")
    return "\n".join(lines)


def growth() -> str:
    """Milliseconds and MiB by size: a row for each curve and variant."""
    lines = _head(["what grows", "variant", "milliseconds, MiB"])
    for curve, rows in json.loads((RESULTS / "growth.json").read_text()).items():
        for variant, points in rows["variants"].items():
            cells = [f"{size}: {1e3 * each['seconds']:.0f} ms, {each['mib']:.0f} MiB" for size, each in points.items()]
            lines.append(f"| {curve} | {variant} | {'; '.join(cells)} |")
    return "\n".join(lines)


def overhead() -> str:
    """Shares of a meta-step: a row for each kind of work."""
    lines = _head(["work", "a meta-step", "sampling", "Python"])
    for work, row in json.loads((RESULTS / "overhead.json").read_text()).items():
        cells = (
            f"{1e3 * row['seconds']['meta-step']:.3g} ms",
            *(f"{100 * row[f'{name}_share']:.1f} %" for name in ("sampling", "python")),
        )
        lines.append(f"| {work} | {' | '.join(cells)} |")
    return "\n".join(lines)


def frozen() -> str:
    """What frozen layers save: a row a pattern, shares of the full one's operations and time."""
    found = json.loads((RESULTS / "frozen.json").read_text())
    lines = _head(["pattern", *(f"{steps}: {what}" for steps in found for what in ("operations", "of a meta-gradient", "time"))])
    for text in next(iter(found.values()))["patterns"]:
        cells = []
        for row in found.values():
            own, full = row["patterns"][text], row["patterns"]["full"]
            cells += [f"{own[name] / full[name]:.3f}" for name in ("operations", "operations_of_meta_gradient")]
            cells.append(f"{own['seconds'] / full['seconds']:.3f} ({1e3 * own['seconds']:.2f} ms)")
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lambda_patterns() -> str:
    """Patterns against the full one on test classes: rows for the one that was searched, for the head alone and for random ones."""
    groups = defaultdict(list)
    for path in sorted((RESULTS / "lambda_patterns").glob("*-seed?.json")):
        name, steps, _ = path.stem.rsplit("-", 2)
        groups[name, int(steps)].append(json.loads(path.read_text()))
    lines = _head(
        ("set", "adapted", "seeds", "accuracy", "times as fast", "operations", "change in points", "the same on photographs")
    )
    for (name, steps), results in groups.items():
        first = f"| {name}, {steps:,} meta-steps"
        found = "; ".join(dict.fromkeys(f"`{result['best']}`" for result in results))
        surely = [result.get("sure", result["best"]) for result in results]
        kinds = {
            "full": [["full*5"]] * len(results),
            f"searched: {found}": [[result["best"]] for result in results],
            f"searched, by the worse end of the interval: `{'`; `'.join(dict.fromkeys(surely))}`": [[text] for text in surely],
            "the head alone (ANIL)": [["head*5"]] * len(results),
            "random, of that cost": [result["randoms"] for result in results],
        }
        for kind, texts in kinds.items():
            if kind.startswith("searched, ") and texts == kinds[f"searched: {found}"]:
                continue
            cells = [_patterns(results, place, texts) for place in ("test", "shift")]
            lines.append(f"{first} | {kind} | {len(results)} | {cells[0]} | {cells[1].rpartition('|')[2].strip() or '-'} |")
    return "\n".join(lines)


def one_step() -> str:
    """One step of adaptation under the pattern that was searched for it, against one of all layers: a row a seed."""
    lines = _head(
        ("set", "seed", "pattern", "all layers", "the pattern", "change in points", "trained: all layers", "the pattern", "change")
    )
    for path in sorted((RESULTS / "lambda_patterns").glob("*-one-step.json")):
        found = json.loads(path.read_text())
        name, steps = path.stem.rsplit("-", 4)[:2]
        full, best = found["same_theta"]["full"], found["same_theta"][found["best"]]
        pairs = [(each["accuracy"], each["interval"]) for each in (full, best)]
        pairs += [(best["difference"], best["difference_interval"]), *(found["trained"][part] for part in ("full", "best", "gain"))]
        cells = [f"{100 * mean:{'+' * (place % 3 == 2)}.2f} ± {100 * half:.2f}" for place, (mean, half) in enumerate(pairs)]
        lines.append(f"| {name}, {int(steps):,} meta-steps | {found['seed']} | `{found['best']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _patterns(results: list[dict], place: str, texts: list[list[str]]) -> str:
    """Means over seeds and patterns of speed, share of the operations, and paired difference with its 95 % interval over seeds."""
    if any(place not in result or not own for result, own in zip(results, texts, strict=True)):
        return ""
    rows = [[(result[place][text], result[place]["full*5"]) for text in own] for result, own in zip(results, texts, strict=True)]
    flat = [pair for own in rows for pair in own]
    faster = sum(full["latency"] / each["latency"] for each, full in flat) / len(flat)
    share = sum(each["operations"] / full["operations"] for each, full in flat) / len(flat)
    gain = sum(each["difference"] for each, _ in flat) / len(flat)
    widths = [sum(each["difference_interval"] for each, _ in own) / len(own) for own in rows]  # random ones share their episodes
    interval = sum(width**2 for width in widths) ** 0.5 / len(widths)
    accuracy = sum(each["accuracy"] for each, _ in flat) / len(flat)
    around = sum((sum(each["interval"] for each, _ in own) / len(own)) ** 2 for own in rows) ** 0.5 / len(rows)
    figures = f"{100 * accuracy:.1f} ± {100 * around:.1f} | {faster:.1f} | {share:.3f}"
    return f"{figures} | {100 * gain:+.1f} ± {100 * interval:.1f}"


def zapping() -> str:
    """Unseen classes learned in every setting: a row for each width and method, means over seeds; and whether the table counts."""
    methods = list(ZAPPED)[:6]
    lines = [_unseen(methods)]
    for (filters, method, steps), results in _zapped(methods).items():
        if (filters, method) == (FLOOR_FILTERS, "asb-zap") and all("frozen 10" in each["settings"] for each in results):
            mean = sum(each["settings"]["frozen 10"]["mean"] for each in results) / len(results)
            held = "held" if mean >= FLOOR else "NOT held, so the table does not count"
            lines.append(
                f"Floor at width {filters}, {steps:,} steps: ASB, zapped, frozen, 10 classes at least {FLOOR}: {held} ({mean:.3f})."
            )
    return "\n\n".join(lines)


def references() -> str:
    """The same of OML and ANML."""
    return _unseen(list(ZAPPED)[6:])


def frozen_600() -> str:
    """Hundreds of unseen classes in one compiled call, on frozen features: a row a network, the best rate by the same draws."""
    lines = _head(("network", "classes", "runs", "updates of an image", "seconds", "best rate", "accuracy at it"))
    for row in json.loads((RESULTS / "frozen_600.json").read_text()).values():
        runs = len(row["tried"]) * row["draws"]
        rate = max(row["tried"], key=lambda rate: row["tried"][rate][0])
        mean, half = row["tried"][rate]
        config = row["config"]
        method = config["method"] + "-zap" * config["zap"]
        name = f"{ZAPPED.get(method, ZAPPED[config['method']])}, width {config['filters']}, seed {config['seed']}"
        updates = runs * row["classes"] * row["shots"]
        cells = (f"{runs}", f"{updates:,}", f"{row['seconds']:.0f}", rate, f"{mean:.3f} ± {half:.3f}")
        lines.append(f"| {name} | {row['classes']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _unseen(methods: list[str]) -> str:
    groups = _zapped(methods)
    tests = sorted({name for results in groups.values() for each in results for name in each["settings"]}, key=_place)
    lines = _head(("method", "width", "steps", "images", "minutes on an idle machine", "seeds", *tests))
    for (filters, method, steps), results in groups.items():
        config = results[0]["config"]
        images = steps * (config["size"] if method.startswith("iid") else config["sequence"] + config["remember"])
        path = RESULTS / "zapping" / f"cost-{filters}.json"
        seconds = json.loads(path.read_text())["seconds_per_step"].get(method) if path.exists() else None
        cells = [[each["settings"][test] for each in results if test in each["settings"]] for test in tests]
        shown = (_of_seeds(own) + f" ({len(own)})" * (0 < len(own) < len(results)) for own in cells)
        minutes = "-" if seconds is None else f"{seconds * steps / 60:.1f}"
        lines.append(
            f"| {ZAPPED[method]} | {filters} | {steps:,} | {images:,} | {minutes} | {len(results)} | {' | '.join(shown)} |"
        )
    return "\n".join(lines)


def _of_seeds(found: list[dict]) -> str:
    """The mean over seeds with its interval; of a single seed the interval is that over its draws."""
    if len(found) == 1:
        return f"{found[0]['mean']:.3f} ± {found[0]['interval95']:.3f}"
    return _over_seeds([each["mean"] for each in found])


def gains() -> str:
    """What zapping adds, and what ASB lacks of Meta-ASB, both zapped: paired by seed, which share classes and images."""
    groups = _zapped(list(ZAPPED)[:6])
    tests = sorted({name for results in groups.values() for each in results for name in each["settings"]}, key=_place)
    means: dict[tuple, dict[int, float]] = defaultdict(dict)
    for (filters, method, steps), results in groups.items():
        for each in results:
            for test, found in each["settings"].items():
                means[filters, steps, method, test][each["config"]["seed"]] = found["mean"]
    lines = _head(("difference", "width", "steps", *tests))
    pairs = [("iid-zap", "iid"), ("asb-zap", "asb"), ("meta-asb-zap", "meta-asb"), ("asb-zap", "meta-asb-zap")]
    for filters, steps in dict.fromkeys((filters, steps) for filters, _, steps in groups):
        for one, other in [pair for pair in pairs if all((filters, each, steps) in groups for each in pair)]:
            both = [(means[filters, steps, one, test], means[filters, steps, other, test]) for test in tests]
            cells = (_over_seeds([mine[seed] - theirs[seed] for seed in mine if seed in theirs], "+.3f") for mine, theirs in both)
            lines.append(f"| {ZAPPED[one]} - {ZAPPED[other]} | {filters} | {steps:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pretraining_rates() -> str:
    """How each method's rates of pre-training were chosen: a row for each pair, the best of a method in bold."""
    lines = _head(("method", "width", "inner rate", "outer rate", "frozen", "unfrozen", "mean"))
    for path in sorted((RESULTS / "zapping").glob("rates-*.json")):
        found = json.loads(path.read_text())
        for method in (each for each in ZAPPED if each in found):
            best = max(row["score"] or 0 for row in found[method].values())
            for rates, row in found[method].items():
                inner, outer = rates.split() if " " in rates else ("-", rates)
                cells = [f"{row['of'][setting]:.3f}" if row["of"] else "diverged" for setting in ("frozen", "unfrozen")]
                score = "falls again" if row["score"] is None else f"{'**' * (row['score'] == best)}{row['score']:.3f}"
                score += "**" * (row["score"] == best)
                lines.append(
                    f"| {ZAPPED[method]} | {path.stem.split('-')[1]} | {inner} | {outer} | {' | '.join(cells)} | {score} |"
                )
    return "\n".join(lines)


def nrml_choice() -> str:
    """What was tried on validation classes: a row for each way, the best of a method in bold."""
    lines = _head(("method", "meta-steps", "channels", "inner rate", "accuracy"))
    for path in sorted((RESULTS / "nrml").glob("choice-*.json")):
        found = json.loads(path.read_text())
        ways = found["ways"].values()
        for way in sorted(ways, key=lambda way: list(NAMES).index(way["method"])):
            best = max(each["valid"][0] for each in ways if each["method"] == way["method"])
            mark = "**" if way["valid"][0] == best else ""
            channels = f"{way['keep']} ({way['where']})" if way["method"].endswith("nrml") else "all"
            score = f"{mark}{100 * way['valid'][0]:.1f} ± {100 * way['valid'][1]:.1f}{mark}"
            cells = (f"{found['meta_steps']:,} of {found['batch']}", channels, f"x {way['rate']:g}", score)
            lines.append(f"| {NAMES[way['method']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def nrml_attempts() -> str:
    """The best NRML, and MAML, with one thing changed: accuracy, how far tasks agree on channels, and how far scales differ."""
    kinds = ("same classes", "other groups", "same minus other groups")
    titles = ("method", "change", "accuracy", "over NRML", "over MAML", *kinds, "by chance", "scales differ between channels")
    lines = _head((*titles, "between tasks"))
    for path in sorted((RESULTS / "nrml").glob("attempts-*.json")):
        for way in json.loads(path.read_text())["ways"].values():
            cells = [NAMES[way["method"]], CHANGED[way["change"]], f"{100 * way['valid'][0]:.1f} ± {100 * way['valid'][1]:.1f}"]
            pairs = [(way["gain"][other], other == way["method"] and not way["change"]) for other in ("nrml", "maml")]
            cells += ["-" if itself else f"{100 * mean:+.1f} ± {100 * half:.1f}" for (mean, half), itself in pairs]
            if "routing" in way:
                routing, spread = way["routing"], way["spread"]
                cells += [f"{routing[kind][0]:.3f} ± {routing[kind][1]:.3f}" for kind in kinds]
                cells += [f"{each:.3f}" for each in (routing["chance"], spread["channels"], spread["tasks"])]
            else:
                cells += ["-"] * (len(kinds) + 3)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def nrml() -> str:
    """Routing against MAML: a row for each set and method, with the gains of NRML and FONRML on the same episodes."""
    rows = defaultdict(list)
    for path in _routed():
        rows[path.stem.rpartition("-seed")[0]].append(json.loads(path.read_text()))
    titles = ("set", "meta-steps of tasks", "method", "channels", "accuracy, each seed")
    lines = _head((*titles, "gain of NRML", "gain of FONRML", "gain of MAML"))
    for name, results in rows.items():
        steps = f"{results[0]['meta_steps']:,} of {results[0]['batch']}"
        for method in ("nrml", "fonrml", "maml", "fomaml"):
            own = [result[method] for result in results]
            scores = ", ".join(f"{100 * each['accuracy'][0]:.1f} ± {100 * each['accuracy'][1]:.1f}" for each in own)
            cells = [scores, *(_points(results, f"{other} - {method}") for other in ("nrml", "fonrml", "maml"))]
            channels = f"{own[0]['keep']} ({own[0]['where']})" if method.endswith("nrml") else "all"
            lines.append(f"| {name.rpartition('-')[0]} | {steps} | {NAMES[method]} | {channels} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _routed() -> list[Path]:
    """Results of `nrml.py compare`, sets in their order, seeds in theirs."""
    seed = {path: int(path.stem.partition("-seed")[2]) for path in (RESULTS / "nrml").glob("*w*s-*-seed*.json")}
    return sorted(seed, key=lambda path: (path.stem[0] == "c", "20w" in path.stem, seed[path]))


def _points(results: list[dict], pair: str) -> str:
    """A gain in points: each seed's, paired, and the mean over seeds with its interval where there are several."""
    found = [100 * np.array(result["gain"][pair]) for result in results if pair in result["gain"]]
    each = ", ".join(f"{mean:+.1f} ± {half:.1f}" for mean, half in found) or "-"
    if len(found) < 2:
        return each
    mean, half = interval(np.array([own for own, _ in found]))
    return f"{each}; mean {mean:+.1f} ± {half:.1f}"


def overlap() -> str:
    """How far tasks of NRML agree on their channels: a row for each run, means over alphabets."""
    kinds = ("same classes", "same group", "other groups", "same minus other groups")
    lines = _head(("set", "method", "seed", *kinds, "by chance"))
    for path in _routed():
        found = json.loads(path.read_text())
        for method in (each for each in ("nrml", "fonrml") if "routing" in found.get(each, {})):
            routing = found[method]["routing"]
            cells = [f"{routing[kind][0]:.3f} ± {routing[kind][1]:.3f}" for kind in kinds]
            name = "-".join(path.stem.split("-")[:2])
            lines.append(f"| {name} | {NAMES[method]} | {found['seed']} | {' | '.join(cells)} | {routing['chance']:.3f} |")
    return "\n".join(lines)


def pruned() -> str:
    """Half of the channels of conv4 cut, trained with and without slimming: a row for each network."""
    lines = _head(("slimming", "filters left", "network", "parameters", "operations, x 1e6", "ms a task", "accuracy", "change"))
    for path in sorted((RESULTS / "nrml").glob("prune-*-seed*.json")):
        found = json.loads(path.read_text())
        for strength, row in found["strengths"].items():
            for name, own in row["networks"].items():
                size = f"{own['parameters']:,} | {own['operations'] / 1e6:.0f} | {1e3 * own['seconds']:.1f}"
                score = f"{100 * own['accuracy'][0]:.1f} ± {100 * own['accuracy'][1]:.1f}"
                mean, half = own["over whole"]
                change = "-" if name == "whole" else f"{100 * mean:+.1f} ± {100 * half:.1f}"
                lines.append(f"| {strength} | {', '.join(map(str, row['filters']))} | {name} | {size} | {score} | {change} |")
    return "\n".join(lines)


def _metanas() -> dict[str, list[dict]]:
    """The finished comparisons of `metanas.py`, those of all seeds of a set."""
    found = [json.loads(path.read_text()) for path in sorted((RESULTS / "metanas").glob("*-seed*.json"))]
    groups = defaultdict(list)
    for each in found:
        own = each["settings"]
        void = f" (void: {', '.join(each.get('void', ()))})" if each.get("void") else ""
        if "adaptation_seconds" in each.get("networks", {}).get("metanas", {}):
            groups[f"{own['name']}, width {own['channels']}, {own['steps']:,} of {own['batch']}{void}"].append(each)
    return groups


def _percent(pair: list[float], form: str = ".1f") -> str:
    """A share and its interval in hundredths."""
    return f"{100 * pair[0]:{form}} ± {100 * pair[1]:.1f}"


def metanas() -> str:
    """MetaNAS beside fixed networks: a row for each, with all seeds."""
    titles = (
        "set, meta-steps of tasks",
        "network",
        "width",
        "parameters",
        "inner rate",
        "ms to adapt",
        "accuracy",
        "MetaNAS' gain",
    )
    lines = _head(titles)
    for name, seeds in _metanas().items():
        for network in seeds[0]["networks"]:
            own = [each["networks"][network] for each in seeds]
            sizes = [f"{each['parameters']:,}" for each in own]
            if network == "metanas":
                sizes = [
                    f"{each['pruning']['parameters']['mean']:,.0f} a task, of {size}"
                    for each, size in zip(seeds, sizes, strict=True)
                ]
            cells = [
                ", ".join(dict.fromkeys(str(each["width"]) for each in own)),
                "; ".join(sizes),
                ", ".join(dict.fromkeys(f"{each['inner_rate']:g}" for each in own)),
                ", ".join(f"{1e3 * each['adaptation_seconds']:.0f}" for each in own),
                ", ".join(_percent(each["test"]) for each in own),
                ", ".join(_percent(each["gain"][network], "+.1f") for each in seeds) if network != "metanas" else "-",
            ]
            lines.append(f"| {name} | {network} | {' | '.join(cells)} |")
    return "\n".join(lines)


def metanas_pruned() -> str:
    """What soft pruning saves and costs the tasks of MetaNAS: a row for each seed and way to adapt."""
    names = ("unpruned", "pruned", "at random"), ("pruned - unpruned", "pruned - at random")
    lines = _head(
        ("set, meta-steps of tasks", "seed", "adapts with", "parameters", "after cuts", "a task's", "share", *names[0], *names[1])
    )
    ways = {"pruning": "what pruning leaves", "pruned afterwards": "all"}
    for name, found, way in (
        (name, each, way) for name, seeds in _metanas().items() for each in seeds for way in ways if way in each
    ):
        own, size = found[way], found[way]["parameters"]
        task = f"{size['mean']:,.0f} ({size['least']:,} to {size['most']:,}) | {size['mean'] / size['all']:.2f}"
        sizes = f"{size['all']:,} | {size['left']:,} | {task}"
        scores = [_percent(own[each]) for each in names[0]] + [_percent(own[each], "+.1f") for each in names[1]]
        lines.append(f"| {name} | {found['seed']} | {ways[way]} | {sizes} | {' | '.join(scores)} |")
    return "\n".join(lines)


def metanas_moved() -> str:
    """How far alphas go, within a task and over meta-training, and how much they decide."""
    names = ("operations", "pairs", "logits", "edges with another operation")
    lines = _head(("set, meta-steps of tasks", "seed", "where", *names, "edges decided", "operations below the threshold"))
    for name, found in ((name, each) for name, seeds in _metanas().items() for each in seeds):
        within, over = found["pruning"]["moved within a task"], found["moved over meta-training"]
        mean = [f"{within[each][0]:.3f} ({within[each][1]:.3f} to {within[each][2]:.3f})" for each in names]
        lines.append(f"| {name} | {found['seed']} | a task | {' | '.join(mean)} | - | - |")
        own = [f"{over[each]:.3f}" for each in names[:-1]] + ["-"]
        own += [f"{found['decided']['meta-model'][each]:.2f}" for each in ("above half", "below the threshold")]
        lines.append(f"| {name} | {found['seed']} | meta-training | {' | '.join(own)} |")
    return "\n".join(lines)


def metanas_cut() -> str:
    """What it saves a task that operations were cut for good."""
    lines = _head(("set, meta-steps of tasks", "seed", "supernet", "parameters", "operations, x 1e9", "ms to adapt"))
    for name, found in ((name, each) for name, seeds in _metanas().items() for each in seeds if "cut for good" in each):
        for which, own in found["cut for good"].items():
            size, work, time = own["parameters"], own["operations"] / 1e9, 1e3 * own["adaptation_seconds"]
            lines.append(f"| {name} | {found['seed']} | {which} | {size:,} | {work:.2f} | {time:.0f} |")
    return "\n".join(lines)


def metanas_speed() -> str:
    """A meta-step of MetaNAS beside PyTorch's."""
    lines = _head(("width", "tasks", "images of a step", "jmeta", "PyTorch", "times as fast"))
    for row in json.loads((RESULTS / "metanas_speed.json").read_text()).values():
        work, seconds = row["work"], row["seconds"]
        times = [
            f"{1e3 * row['medians'][name]:.0f} ({1e3 * min(own):.0f} to {1e3 * max(own):.0f})" for name, own in seconds.items()
        ]
        lines.append(f"| {work['channels']} | {work['tasks']} | {5 * work['shots']} | {' | '.join(times)} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def _zapped(methods: list[str]) -> dict[tuple[int, str, int], list[dict]]:
    """Results of `zapping.py` by width, method and steps, in that order.

    Raises:
      ValueError: results of a method differ in more than their seed.
    """
    groups = defaultdict(list)
    for path in sorted((RESULTS / "zapping").glob("*-seed*.json")):
        result = json.loads(path.read_text())
        if result["method"] in methods:
            groups[result["config"]["filters"], result["method"], result["config"]["steps"]].append(result)
    for (_, method, _), results in groups.items():
        if len({json.dumps({**each["config"], "seed": None}, sort_keys=True) for each in results}) > 1:
            raise ValueError(f"zapping: the results of {method} are of several configurations; measure some of them anew.")
    return dict(sorted(groups.items(), key=lambda group: (group[0][0], methods.index(group[0][1]), group[0][2])))


def _place(test: str) -> tuple[int, int]:
    """Where a column such as "frozen 10" stands."""
    setting, classes = test.split()
    return ("frozen", "unfrozen", "fine-tuned").index(setting), int(classes)


def plasticity() -> str:
    """A stream of shuffled images: a row for each optimiser, accuracy on its first task and over its last, means over seeds."""
    rows = json.loads((RESULTS / "plasticity.json").read_text())
    lines = _head(("optimiser", "seeds", "first task", "last 20 tasks", "change"))
    for name, row in rows.items():
        scores = [each["accuracy"] for each in row["seeds"].values()]
        first, last = [each[0] for each in scores], [sum(each[-20:]) / 20 for each in scores]
        change = _over_seeds([after - before for before, after in zip(first, last, strict=True)], "+.3f")
        lines.append(f"| {name} | {len(scores)} | {_over_seeds(first)} | {_over_seeds(last)} | {change} |")
    return "\n".join(lines)


def _over_seeds(means: list[float], form: str = ".3f") -> str:
    """The mean of seeds with its 95 % interval by Student's t; a dash where there is none."""
    if not means:
        return "-"
    mean, half = interval(np.array(means))
    return f"{mean:{form}}" + (f" ± {half:.3f}" if len(means) > 1 else "")


def _head(titles: Iterable[str]) -> list[str]:
    """The first two lines of a table."""
    titles = list(titles)
    return [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]


def fill(text: str) -> str:
    """A page with every marked table as the results have it."""
    for make in (
        omniglot,
        sinusoid,
        speed,
        reach,
        needs,
        growth,
        overhead,
        frozen,
        lambda_patterns,
        one_step,
        pretraining_rates,
        zapping,
        references,
        frozen_600,
        gains,
        plasticity,
        nrml_choice,
        nrml_attempts,
        nrml,
        overlap,
        pruned,
        metanas,
        metanas_pruned,
        metanas_moved,
        metanas_cut,
        metanas_speed,
    ):
        mark = f"<!-- table: {make.__name__} -->"
        if mark in text:
            before, _, after = text.split(mark)
            text = f"{before}{mark}\n{make()}\n{mark}{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
