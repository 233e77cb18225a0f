"""The command line: `jmeta train [PRESET]`, `eval`, `adapt`, `search`, `derive`, `presets`, `data`, `plot`, `bench` ..."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from jmeta import checkpoint, hosts, presets, pretrain
from jmeta.autotune import use_cache
from jmeta.commands import adaptation, comparison, evaluation, listing, pictures, pretraining, training
from jmeta.hosts import start_processes
from jmeta.mesh import use_cores

USAGE = """usage: jmeta COMMAND ...

  train [PRESET] [--steps N ...]   meta-train, test on unseen classes, leave a run in a new folder
  train --resume RUN [--steps N]   go on with a run that was stopped, or for more steps
  eval RUN                         test a run again
  eval RUN --protocol continual    let a pre-trained network learn unseen classes in sequence; or transfer
  adapt RUN --support DIR --query DIR   learn the classes of your own pictures and classify others
  search RUN [--tolerance 0.01]    find the fastest pattern of adaptation within a tolerance
  presets                          list the presets
  data NAME                        render glyphs, fetch omniglot or read photographs, and show what is there
  plot RUN [--routing] [--cells]   draw learning curve, inner steps and an episode; or the channels that tasks choose, or cells
  derive RUN                       write the architecture that a run of metanas came to, for train PRESET --genotype FILE
  compare --learners A B ... --out DIR   train learners in turn on the same tasks: one table, one picture
  compare RESULT ... --out FILE    draw continual results, accuracy against classes learned, in one picture
  bench [speed|growth|overhead|frozen]   time jmeta and peers; how cost grows; what is beside it; what frozen layers save

`jmeta COMMAND --help` lists the options; `jmeta train PRESET --help` shows all fields of a preset."""

ERRORS = (ValueError, TypeError, OSError, FloatingPointError, RuntimeError, ImportError)


@dataclasses.dataclass(frozen=True)
class _Where:
    """Where a run is written."""

    out: str | None = None
    """A new folder for the run; runs/PRESET-DATE-TIME if not given."""
    devices: int | None = None
    """GPUs, or cores, that the tasks of a meta-step are spread over; as many as can take equal shares if not given. With
    --distributed all GPUs are used, and this is the number of cores of each process."""
    distributed: bool = False
    """This is one of several processes that train the run together, on all their devices; all of them must see --out."""
    coordinator: str | None = None
    """With --distributed where no scheduler tells: HOST:PORT at which process 0 is found."""
    processes: int | None = None
    """Likewise: how many there are."""
    process: int | None = None
    """Likewise: the number of this one, from 0."""

    def begin(self, config: Any) -> None:
        """Joins the other processes and sets the devices up, before anything is computed."""
        given = (self.coordinator, self.processes, self.process)
        if not self.distributed and any(value is not None for value in given):
            raise ValueError("train: --coordinator, --processes and --process go with --distributed.")
        if self.distributed and isinstance(config, pretrain.Pretrain):
            raise ValueError(
                "train: --distributed shares out the tasks of a meta-step; pre-training takes one, so run a seed on each."
            )
        if self.distributed:
            start_processes(*given)
        use_cores(self.devices)
        use_cache()


def _train(args: list[str]) -> None:
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--resume=") else [arg])]
    if "--resume" in args:
        return _resume(args)
    named = bool(args) and not args[0].startswith("-")
    name = args[0] if named else presets.DEFAULT
    default = pretrain.PRESETS[name] if name in pretrain.PRESETS else presets.preset(name, tuple(pretrain.PRESETS))
    prog = f"jmeta train {name}"
    where, config = _parse(prog, args[named:], default)
    if where.distributed and where.out is None:
        raise ValueError("train: --distributed needs --out, the same folder in every process.")
    where.begin(config)
    if isinstance(config, pretrain.Pretrain):
        print(pretraining.train(config, where.out, name=name))
    else:
        _tell(training.train(config, where.out, name=name, devices=where.devices))


def _resume(args: list[str]) -> None:
    place = args.index("--resume")
    if place + 1 >= len(args):
        raise ValueError("train: --resume needs the folder of a run.")
    run = args[place + 1]
    kept = checkpoint.read_run(run)["config"]
    config = pretrain.from_dict(kept) or presets.from_dict(kept, run)
    where, changed = _parse("jmeta train --resume RUN", args[:place] + args[place + 2 :], config)
    if where.out is not None:
        raise ValueError("train: --resume goes on in the folder of its run; it takes no --out.")
    if isinstance(config, pretrain.Pretrain):
        if config.method == "iid" and config.zap and changed.steps != config.steps:
            raise ValueError(f"train: the zaps of {run} end with its {config.steps} steps, which cannot change now.")
        where.begin(config)
        return print(pretraining.train(changed, run, resume=True))
    if config.outer_schedule != "constant" and changed.steps != config.steps:
        raise ValueError(f"train: the outer rate of {run} falls over {config.steps} steps, which cannot change now.")
    if where.devices is None and not where.distributed:
        where = dataclasses.replace(where, devices=checkpoint.read_run(run).get("devices", 1))
    where.begin(config)
    _tell(training.train(changed, run, resume=True, devices=where.devices))


def _tell(folder: Path) -> None:
    if hosts.leads():
        print(folder)


def _parse(prog: str, args: list[str], default: Any) -> tuple[_Where, Any]:
    where = tyro.conf.arg(name="")
    kinds = tuple[Annotated[_Where, where], Annotated[type(default), where]]
    return tyro.cli(kinds, prog=prog, args=args, default=(_Where(), default))


def main() -> None:
    """Runs one command; expected errors are printed in one line and exit with 1."""
    args = sys.argv[1:]
    shown: dict[str, Any] = {"eval": evaluation.evaluate, "adapt": adaptation.adapt, "search": evaluation.search}
    shown |= {"plot": pictures.plot, "derive": pictures.derive, "compare": pretraining.compare}
    silent = {"presets": listing.show_presets, "data": listing.data}
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return
    command, rest = args[0], args[1:]
    try:
        if command == "train":
            _train(rest)
        elif command == "bench":
            sys.exit(listing.bench(rest))
        elif command in shown:
            use_cores()
            use_cache()
            is_protocol = command == "eval" and any(arg.startswith("--protocol") for arg in rest)
            function = pretraining.evaluate if is_protocol else shown[command]
            if command == "compare" and any(arg.startswith("--learners") for arg in rest):
                function = comparison.compare
            made = tyro.cli(function, prog=f"jmeta {command}", args=rest)
            print(*made if isinstance(made, list) else [made], sep="\n")
        elif command in silent:
            tyro.cli(silent[command], prog=f"jmeta {command}", args=rest)
        else:
            raise ValueError(f"{command!r} is no command; jmeta --help lists them.")
    except ERRORS as error:
        print(f"jmeta {command}: {error}", file=sys.stderr)
        hosts.leave(1)
    except KeyboardInterrupt as error:
        print(str(error) or "Stopped.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
