"""The command line, as a user runs it."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from jmeta import __main__ as line

SMALL = [
    "--filters",
    "4",
    "--batch",
    "4",
    "--test-episodes",
    "20",
    "--validate-every",
    "10",
    "--validate-episodes",
    "10",
    "--test-queries",
    "5",
    "--save-every",
    "10",
]
PRESET = "anil-omniglot-5w1s"


def _jmeta(*args, cwd):
    command = [sys.executable, "-m", "jmeta", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def _fails(*args, cwd):
    """What a command says that cannot be run; within this process, which has its devices already."""
    said, kept = io.StringIO(), [mock.patch.object(line, name) for name in ("use_cores", "use_cache")]
    with contextlib.ExitStack() as stack:
        for each in (*kept, mock.patch.object(sys, "argv", ["jmeta", *map(str, args)]), contextlib.chdir(cwd)):
            stack.enter_context(each)
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        with pytest.raises(SystemExit) as stopped:
            line.main()
    assert stopped.value.code == 1
    return said.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an image set in Omniglot's form, whose classes are bars at their own places."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    pictures = rng.random((1623, 7, 7)).round().repeat(4, 1).repeat(4, 2) * 255
    noise = rng.integers(0, 60, (1623, 20, 28, 28))
    images = np.abs(pictures[:, None] - noise).astype(np.uint8).reshape(-1, 28, 28)
    images[:, 0] = images[:, -1] = images[:, :, 0] = images[:, :, -1] = 0
    number = np.arange(1623)
    classes = {"class_id": number, "alphabet_id": number // 40, "char_in_alphabet": number % 40, "split": (number >= 964) * 1}
    rows = {name: np.repeat(column, 20) for name, column in classes.items()}
    names = np.array([f"Alphabet{index:02d}" for index in range(41)])
    np.savez(folder / "images.npz", images=images, drawer=np.tile(np.arange(20), 1623), alphabet_names=names, **rows)
    return folder


@pytest.fixture(scope="module")
def run(place):
    done = _jmeta("train", PRESET, "--source", "images.npz", "--steps", 20, "--out", "run", *SMALL, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "run"
    return place / "run"


def test_train_leaves_a_whole_run(run):
    left = {path.name for path in run.iterdir()}
    assert left >= {"run.json", "checkpoints", "metrics.jsonl", "result.json", "tensorboard"}
    assert left >= {"learning_curve.png", "inner_steps.png", "episode.png"}
    result = json.loads((run / "result.json").read_text())
    assert result["episodes"] == 20 and result["norm"] == "batch" and result["transductive"] is True
    assert 0 <= result["mean"] <= 1 and len(result["by_step"]) == 4 and result["interval95"] > 0
    assert result["config"]["method"] == "anil" and result["versions"]["jax"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20]


def test_eval_plot_and_resume(run):
    done = _jmeta("eval", "run", "--episodes", 10, "--steps", 5, "--split", "valid", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert "95 % interval, 10 episodes" in done.stdout and "[norm: batch]" in done.stdout
    written = json.loads((run.parent / done.stdout.splitlines()[-1]).read_text())
    assert len(written["by_step"]) == 6 and written["split"] == "valid"
    (run / "episode.png").unlink()
    assert _jmeta("plot", "run", cwd=run.parent).returncode == 0
    assert (run / "episode.png").stat().st_size > 1000
    again = _jmeta("train", "--resume", "run", "--steps", 30, cwd=run.parent)
    assert again.returncode == 0, again.stderr
    assert (run / "checkpoints" / "30").is_dir()


def test_search_finds_a_pattern_that_eval_and_adapt_use(run, tmp_path):
    done = _jmeta("search", "run", "--steps", 2, "--episodes", 10, "--timed", 2, "--rounds", 0, "--tolerance", 0.5, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    path = run.parent / done.stdout.splitlines()[-1]
    found = json.loads(path.read_text())
    assert found["tolerance"] == 0.5 and found["episodes"] == 10 and found["norm"] == "batch"
    assert found["best"]["difference"] >= -0.5 and len(found["table"]) == len({str(each["rows"]) for each in found["table"]})
    assert path.with_suffix(".png").stat().st_size > 1000

    done = _jmeta("eval", run, "--pattern", path, "--episodes", 10, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    written = json.loads((run.parent / done.stdout.splitlines()[-1]).read_text())
    assert written["config"]["pattern"] == found["best"]["text"] and len(written["by_step"]) == 3
    _draw(tmp_path / "support" / "moon", 0, True)
    done = _jmeta(
        "adapt", run, "--support", tmp_path / "support", "--query", tmp_path / "support", "--pattern", path, cwd=run.parent
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "other.json").write_text(json.dumps({"layers": ["a", "b"], "rows": [[0, 1]]}))
    assert "is for the layers a, b; the run has block1" in _fails("eval", run, "--pattern", tmp_path / "other.json", cwd=run.parent)
    assert "tolerance must be" in _fails("search", run, "--tolerance", -1, cwd=run.parent)


def _draw(folder, number, dark):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(number)
    shape = rng.random((7, 7)).round().repeat(15, 0).repeat(15, 1) * 255
    for index in range(4):
        picture = np.abs(shape - rng.integers(0, 60, shape.shape)).astype(np.uint8)
        picture[[0, -1]] = picture[:, [0, -1]] = 0
        Image.fromarray(255 - picture if dark else picture).save(folder / f"{index}.png")


@pytest.mark.parametrize("dark", [True, False])
def test_adapt_names_pictures_it_never_saw(run, tmp_path, dark):
    for number, name in enumerate(("moon", "star", "tree")):
        _draw(tmp_path / "all" / name, number, dark)
        for part in ("support", "query"):
            (tmp_path / part / name).mkdir(parents=True)
        for index in range(4):
            picture = tmp_path / "all" / name / f"{index}.png"
            picture.rename(tmp_path / ("support" if index < 2 else "query") / name / f"{index}.png")
    done = _jmeta("adapt", run, "--support", "support", "--query", "query", "--out", "out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == 6 and f"{sum(row['truth'] == row['predicted'] for row in rows)} of 6 right" in done.stdout
    assert all(set(row["probabilities"]) == {"moon", "star", "tree"} for row in rows)
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=0.001) for row in rows)
    assert "exists already" in _fails("adapt", run, "--support", "support", "--query", "query", "--out", "out.json", cwd=tmp_path)
    (tmp_path / "support" / "moon" / "0.png").write_text("no picture")
    assert "0.png" in _fails("adapt", run, "--support", "support", "--query", "query", cwd=tmp_path)


def test_adapt_refuses_more_classes_than_ways(run, tmp_path):
    for number in range(6):
        _draw(tmp_path / "support" / str(number), number, True)
    assert "6 classes" in _fails("adapt", run, "--support", "support", "--query", "support", cwd=tmp_path)


def test_presets_and_help_are_listed(tmp_path):
    assert PRESET in _jmeta("presets", cwd=tmp_path).stdout
    assert "adapt RUN" in _jmeta(cwd=tmp_path).stdout
    assert "--inner-rate" in _jmeta("train", PRESET, "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (["train", "maml-omniglot-5w2s"], "nearest is 'maml-omniglot-5w"),
        (["train", PRESET, "--source", "nowhere.npz"], "nowhere.npz"),
        (["train", PRESET, "--source", "images.npz", "--ways", "500"], "ways is 500"),
        (["train", PRESET, "--source", "images.npz", "--queries", "20"], "shots + queries is 1 + 20"),
        (["train", PRESET, "--source", "images.npz", "--batch", "6", "--chunk", "4"], "divisible by chunk"),
        (["train", PRESET, "--source", "images.npz", "--batch", "7", "--devices", "2"], "the nearest batches that fit: 6 and 8"),
        (["train", PRESET, "--source", "images.npz", "--out", "."], "not empty"),
        (["train", "--resume", "nowhere"], "no jmeta run"),
        (["eval", "nowhere"], "no jmeta run"),
    ],
)
def test_bad_input_ends_in_one_clear_line(place, args, message):
    said = _fails(*args, cwd=place)
    assert message in said and said.startswith(f"jmeta {args[0]}: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "args, message",
    [(["train", PRESET, "--source", "images.npz", "--devices", "0"], "must be at least 1, got 0"), (["fly"], "no command")],
)
def test_bad_input_ends_a_process_without_a_traceback(place, args, message):
    done = _jmeta(*args, cwd=place)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_importing_is_light():
    heavy = ("tensorflow", "matplotlib", "tensorflow_datasets", "orbax", "tyro", "scipy.stats")
    code = f"import sys, jmeta; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (("--rows", "sinusoid", "--orders", "2", "--peers", "jax plain", "--tasks", "2", "--repeats", "1"), "sinusoid, order 2"),
        (("growth", "--curves", "steps", "--most", "1", "--repeats", "1", "--tasks", "1", "--filters", "4"), "steps"),
    ],
    ids=["speed", "growth"],
)
def test_bench_writes_what_it_measures_and_keeps_what_is_there(tmp_path, args, name):
    (tmp_path / "results.json").write_text("{}")
    done = _jmeta("bench", *args, "--platform", "cpu", "--out", "results.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert name in found and (tmp_path / "results.png").is_file()
    if name == "steps":
        assert found["steps"]["variants"]["second order"]["1"]["seconds"] > 0
    else:
        contenders = found[name]["contenders"]
        assert contenders["jmeta"]["seconds"]["median"] > 0 and contenders["jax plain"]["difference"] < 1e-6


def test_pretraining_is_zapped_resumed_and_evaluated_both_ways(place):
    small = ["--filters", 2, "--sequence", 3, "--remember", 4, "--test-classes", 2, "--test-draws", 2]
    done = _jmeta("train", "zap-asb-omniglot", "--source", "images.npz", "--steps", 4, "--out", "zapped", *small, cwd=place)
    assert done.returncode == 0, done.stderr
    result = json.loads((place / "zapped" / "result.json").read_text())
    assert (
        result["protocol"] == "continual" and result["classes"] == 2 and result["norm"] == "instance" and 0 <= result["mean"] <= 1
    )
    assert (place / "zapped" / "result.png").is_file() and (place / "zapped" / "learning_curve.png").is_file()
    done = _jmeta("train", "--resume", "zapped", "--steps", 6, cwd=place)
    assert done.returncode == 0, done.stderr
    for protocol in (["continual", "--frozen"], ["transfer", "--method", "least_squares"]):
        rest = ["--classes", 2, "--draws", 2, "--rates", "0.01", "0.001"]
        done = _jmeta("eval", "zapped", "--protocol", *protocol, *rest, cwd=place)
        assert done.returncode == 0, done.stderr
        written = json.loads((place / done.stdout.splitlines()[-1]).read_text())
        assert written["protocol"] == protocol[0] and written["draws"] == 2 and written["config"]["steps"] == 6
        results = ["zapped", done.stdout.splitlines()[-1]]
        if protocol[0] == "continual":
            assert _jmeta("compare", *results, "--out", "both.png", cwd=place).returncode == 0
            assert (place / "both.png").stat().st_size > 1000
            assert "exists already" in _fails("compare", *results, "--out", "both.png", cwd=place)
        else:
            assert "no result of --protocol continual" in _fails("compare", *results, "--out", "other.png", cwd=place)
    assert "is one of pre-training" in _fails("eval", "zapped", cwd=place)


def test_channels_that_nrmls_tasks_choose_are_compared(place, run):
    few = ["--steps", 4, "--inner-steps", 2, "--test-steps", 2, "--out", "routed"]
    done = _jmeta("train", "nrml-omniglot-5w1s", "--source", "images.npz", *few, *SMALL, cwd=place)
    assert done.returncode == 0, done.stderr
    done = _jmeta("plot", "routed", "--routing", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "channels in common: same classes" in done.stdout and "[norm: batch]" in done.stdout
    found = json.loads((place / "routed" / "routing.json").read_text())
    assert found["chance"] == 0.5 and 0.5 < found["same classes"][0] <= 1 and found["groups"] > 2
    assert (place / "routed" / "routing.png").stat().st_size > 1000
    assert "is of method anil, which chooses no channels" in _fails("plot", "run", "--routing", cwd=place)
