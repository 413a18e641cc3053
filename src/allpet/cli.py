"""The command line: ``allpet fit|validate|test|predict --config FILE ...``.

One LightningCLI. Files merge from left to right and options come after them; ``${scale.batch_size}`` in any file refers
to the merged whole. In ``fit`` and ``predict`` the data are loaded and checked first; in ``fit`` what they are decides
which run is continued (``allpet.runs``) and which weights it builds on; only then is a checkpoint or a pretrained
folder read.

Where a model takes a pretrained folder, the root of a stage, such as ``outputs/vae``, means its newest finished run:
for ``model.autoencoder`` in ``fit``, the newest that was trained on the same data.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from filelock import FileLock
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ProgressBar, WeightAveraging
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf import OmegaConf

from allpet import faults, runs
from allpet.geometry import ParallelBeam
from allpet.memory import GB, check_budget, geometry_of, training_of
from allpet.precision import fast_precision
from allpet.privacy import with_home, without_secrets
from allpet.run_files import AtomicCheckpointIO, RunCSVLogger, on_the_disk, trim_metrics

# Tells the processes that the first one launches which run they share.
_SHARED_RUN = "ALLPET_RUN_FOLDER"
_NULL = ("null", "None", "~")
_NO_NAME = "Several processes were started from outside: name their common run with --run.name=NAME."


def main(args: ArgsType = None) -> None:
    """Run the command line; ``args``, a list of words, takes the place of the shell's."""
    prepare()
    words = sys.argv[1:] if args is None else args
    try:
        AllpetCLI(with_nulls(words) if isinstance(words, list) else words)
    except KeyboardInterrupt as error:  # data were being read or simulated
        raise SystemExit("allpet: Stopped.") from error


def with_nulls(words: list[str]) -> list[str]:
    """Spell ``--model.a.b=null`` as ``--model.a={b: null}``.

    jsonargparse hands values further down as text, and None becomes "None" (4.53, adapt_class_type).

    Args:
        words: of a command line.
    """
    spelled: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        key, equals, value = word.partition("=")
        alone = bool(equals) or index + 1 == len(words) or words[index + 1].startswith("--")
        given = words[index : index + (1 if alone else 2)]
        index += len(given)
        path = [part for part in key.split(".") if part != "init_args"]
        if path[0] in ("--model", "--data") and len(path) >= 3 and (value if alone else given[-1]) in _NULL:
            inner = "null"
            for part in reversed(path[2:]):
                inner = f"{{{part}: {inner}}}"
            given = [f"{path[0]}.{path[1]}={inner}"]
        spelled += given
    return spelled


def prepare() -> None:
    """Set up what parsing a configuration needs."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a newer name exists, but means something else in omegaconf 2.3
        OmegaConf.register_new_resolver("fast_precision", fast_precision, replace=True)
        OmegaConf.register_new_resolver("plus", lambda first, second: first + second, replace=True)
    # Continuing a run, and testing one without what only matters in training, is what is meant.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended to run from within Python")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))


class AllpetCLI(LightningCLI):
    """LightningCLI that loads the data first, keeps runs, and lets the command line win over checkpoints.

    Args:
        args: the words of the command line; None takes the shell's.
    """

    run: runs.Run | None = None
    folder: Path | None = None
    finished = False
    _resume_from: Path | None = None
    _lock: FileLock | None = None

    def __init__(self, args: ArgsType = None) -> None:
        mode = {"parser_mode": "omegaconf+", "exit_on_error": False}
        try:
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=RunConfig,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_kwargs={**mode, **{name: dict(mode) for name in self.subcommands()}},
                args=args,
            )
        except UnicodeDecodeError as error:
            raise SystemExit(f"allpet: A configuration file holds no text ({error}): give YAML files.") from error
        except BaseException:
            if self.folder is not None and self.run is None and _rank() == 0:  # of results, not of a training
                runs.remove_if_empty(self.folder)
            raise
        finally:
            if self._lock is not None:
                self._lock.release()
            if _rank() == 0:
                os.environ.pop(_SHARED_RUN, None)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; say in one sentence what is wrong with an option."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            print(f"allpet: {_option_error(str(error))}", file=sys.stderr)
            raise SystemExit(2) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``run`` and the free-form ``scale``, which other keys refer to."""
        parser.add_class_arguments(runs.RunOptions, "run")
        parser.add_argument("--scale", type=dict, default={}, help="Sizes that other keys refer to as ${scale.NAME}.")

    def _parse_ckpt_path(self) -> None:
        # Lightning would let a checkpoint's hyper-parameters override files and command line, silently.
        pass

    def instantiate_classes(self) -> None:
        """Load the data, choose run and weights, then build model and trainer."""
        self.config = _with_home(self.config)  # what a run's own config.yaml writes as ~
        config, fit = self.config[self.subcommand], self.subcommand == "fit"
        options = runs.RunOptions(**config.run)
        keep = options.root is not None and not config.trainer.fast_dev_run
        try:
            for stage in _stages(config).values():
                runs.newest_pretrained(stage)  # refused before data are read, which may take minutes
            if fit:
                self._check_memory(config, options)
            data = self._load_data(config) if fit or self.subcommand == "predict" else None
            if fit and data and geometry_of(config) is None:
                self._check_memory(config, options, data.geometry)  # type: ignore[attr-defined]
            weights = _resolve_pretrained(config, data.stage1_data_hash if fit else None)  # type: ignore[union-attr]
            if keep and data and fit:
                key = runs.fingerprint(self._plain(config), data.data_hash, weights)  # type: ignore[attr-defined]
                self._choose_run(config, options, key, data.data_hash)  # type: ignore[attr-defined]
            elif keep and self.subcommand == "predict":
                self.folder = _new_folder(options)
                os.environ[_SHARED_RUN] = str(self.folder)
            if self.finished:
                return
            self.config_init = self.parser.instantiate_classes(self._for_folder())
        except (OSError, ValueError, RuntimeError) as error:
            # what the user gave cannot work: one sentence, no traceback
            said = faults.in_a_sentence(error) if isinstance(error, OSError) and error.errno else _reason(error)
            raise SystemExit(f"allpet: {said}") from error
        self.datamodule = data or self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; everything it writes goes to the run's folder."""
        trainer = self._get(self.config_init, "trainer")
        aside: tuple[type, ...] = () if trainer["enable_progress_bar"] is not False else (ProgressBar,)
        if trainer["logger"] is False:
            aside = (*aside, LearningRateMonitor)  # it would refuse to watch for nobody
        if self.subcommand != "fit":  # a run's own configuration may be given; these only matter in training
            aside = (*aside, Checkpoint, WeightAveraging)
        if isinstance(trainer["callbacks"], list):
            trainer["callbacks"] = [callback for callback in trainer["callbacks"] if not isinstance(callback, aside)]
        if self.folder is None:
            self.save_config_callback = None
            if self.subcommand != "fit":  # the scores are printed
                kwargs["logger"] = trainer["logger"] or False
            kwargs["plugins"] = [*_listed(trainer["plugins"]), AtomicCheckpointIO()]
            return super().instantiate_trainer(**kwargs)
        self.save_config_kwargs = {"folder": self.folder, "save_to_log_dir": False}
        given = trainer["logger"]
        if given is not False and self.subcommand == "fit":
            others = [given] if isinstance(given, Logger) else [] if given in (None, True) else list(given)
            kwargs["logger"] = [*others, RunCSVLogger(self.folder)]
        elif self.subcommand != "fit":
            kwargs["logger"] = False
        kwargs["plugins"] = [*_listed(trainer["plugins"]), AtomicCheckpointIO()]
        return super().instantiate_trainer(default_root_dir=str(self.folder), **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        if self.finished:
            assert self.run is not None
            rank_zero_info(
                f"Run {self.run.folder} has finished ({self.run.record['finished']['step']} steps): raise "
                "--trainer.max_steps to train on, or add --run.resume=false to start another run."
            )
            return
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException as error:
            raise SystemExit(f"allpet: Stopped from outside (SIGTERM).{self._kept()}") from error
        except (SystemExit, KeyboardInterrupt) as error:  # Lightning has answered Ctrl+C, or what that led to
            rank_zero_info(f"Stopped.{self._kept()}")
            raise SystemExit(error.code if isinstance(error, SystemExit) else 1) from error
        except Exception as error:
            data, trainer = self.datamodule, self.config[subcommand].trainer
            batch_size = getattr(data, "batch_size", None) if subcommand == "fit" else None
            said = faults.in_a_sentence(error, batch_size, trainer.accumulate_grad_batches)
            if said is None:
                rank_zero_info(f"Stopped by an error.{self._kept()}")
                raise
            raise SystemExit(f"allpet: {said}{self._kept()}") from error

    def _kept(self) -> str:
        """Say what a training that was stopped has left."""
        if self.run is None or _rank() != 0:
            return ""
        kept = runs.usable_checkpoint(self.run.checkpoints)
        return f" The same command continues at step {kept[1]}." if kept else " No checkpoint had been written yet."

    def before_fit(self) -> None:
        """Where a launcher has started all processes, continue from the checkpoint that the first has chosen."""
        if self.run is not None and _launched_from_outside():
            self.trainer.strategy.setup_environment()  # fit() does so again, to no effect
            chosen = self.config_init[self.subcommand].ckpt_path
            self.config_init[self.subcommand].ckpt_path = self.trainer.strategy.broadcast(chosen)

    def after_fit(self) -> None:
        """Record that the run has finished."""
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()  # or the next fit of this process would write into it
        if self.run is not None and self.trainer.is_global_zero:
            limits = _limits(self.config[self.subcommand].trainer)
            self.run.update(finished={"step": self.trainer.global_step, "limits": limits})
            rank_zero_info(f"Run {self.run.folder} has finished.")

    def _check_memory(self, config: Namespace, options: runs.RunOptions, geometry: ParallelBeam | None = None) -> None:
        budget, geometry = options.memory_budget_gb, geometry or geometry_of(config)
        if budget is None or geometry is None:
            return
        if not hasattr(os, "fork"):  # see allpet.memory.estimate
            rank_zero_info("memory_budget_gb is not checked on this system; make memory estimates what training takes.")
            return
        device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
        found = check_budget(training_of(config, self._parser("fit"), device, geometry), budget)
        rank_zero_info(f"Estimated peak memory: {found.peak / GB:.2f} GB of {budget:g} GB.")

    def _load_data(self, config: Namespace) -> LightningDataModule:
        data: LightningDataModule = self._parser(self.subcommand).instantiate_classes(Namespace(data=config.data)).data
        data.prepare_data()
        data.setup(str(self.subcommand))
        return data

    def _choose_run(self, config: Namespace, options: runs.RunOptions, key: str, data_hash: str) -> None:
        root, first = Path(str(options.root)), _rank() == 0
        shared = _shared_folder()
        if shared is not None:
            run = runs.Run(shared, {})
        elif options.name is not None:
            run = _named_run(root / options.name, options, key, data_hash)
        elif _launched_from_outside():
            raise RuntimeError(_NO_NAME)
        else:
            for folder in runs.lost_runs(root) if first else ():
                rank_zero_info(f"{folder} has checkpoints but no readable run.json: its training is not continued.")
            found = runs.find_run(root, key) if options.resume else None
            run = found or runs.create_run(root, key, data_hash)
        self.run, self.folder = run, run.folder
        if first:
            self._lock = run.lock()
            os.environ[_SHARED_RUN] = str(run.folder)
            runs.tidy(run.folder)
            runs.adopt_requeued(run)
        done, max_steps = run.record.get("finished"), config.trainer.max_steps
        if done and (done["limits"] == _limits(config.trainer) or 0 < max_steps <= done["step"]):
            self.finished = True
            return
        if not first and shared is None:  # the first process tidies the run at this moment, and decides (before_fit)
            return
        newest = runs.usable_checkpoint(run.checkpoints)
        if newest and 0 < max_steps < newest[1]:
            raise ValueError(
                f"Run {run.folder} has already trained {newest[1]} steps, more than --trainer.max_steps={max_steps}: "
                "raise it, or add --run.resume=false to start another run."
            )
        if newest and config.ckpt_path:
            raise ValueError(
                f"Run {run.folder} continues from its own checkpoint: leave out --ckpt_path, or add --run.resume=false "
                "to start another run from it."
            )
        # A checkpoint of the last step in a run that has not finished was killed while it exported: step back once.
        usable = runs.usable_checkpoint(run.checkpoints, before_step=max_steps if max_steps > 0 else None)
        self._resume_from = usable[0] if usable else None
        if first:
            trim_metrics(run.folder / "metrics.csv", usable[1] if usable else 0)
            rank_zero_info(f"Run {run.folder} {f'continues at step {usable[1]}' if usable else 'starts'}.")

    def _for_folder(self) -> Namespace:
        """Return the configuration with the checkpoint to continue from, and with the run as W&B's folder and name."""
        config = self.config.clone()
        if self.run is None:
            return config
        if self._resume_from is not None:
            config[self.subcommand].ckpt_path = str(self._resume_from)
        given = config[self.subcommand].trainer.logger
        for logger in given if isinstance(given, list) else [given]:
            if isinstance(logger, Namespace) and logger.class_path.endswith("WandbLogger"):
                stage, number = self.run.folder.parent.name, self.run.folder.name
                created = "".join(digit for digit in self.run.record.get("created", "") if digit.isdecimal())
                logger.init_args.name = logger.init_args.get("name") or f"{stage}-{number}"
                logger.init_args.id = logger.init_args.get("id") or f"{stage}-{number}-{created[:20]}"
                logger.init_args.save_dir = str(self.run.folder)
        return config

    def _plain(self, config: Namespace) -> dict[str, Any]:
        text = self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)
        plain: dict[str, Any] = yaml.safe_load(text)
        return plain


class RunConfig(SaveConfigCallback):
    """Write the resolved configuration into the run's folder and hand it to loggers that keep configurations.

    Keys and the home folder are left out (``allpet.privacy``). Lightning's own writes where the first logger saves,
    which for W&B is shared by all runs.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path, **kwargs: Any) -> None:
        super().__init__(parser, config, **kwargs)
        self.folder = folder

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write config.yaml, whole or not at all."""
        text = without_secrets(self.parser.dump(self.config, skip_none=False))
        with on_the_disk(self.folder / self.config_filename) as scratch:
            scratch.write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams(_without_paths_and_names(yaml.safe_load(text)))


def _without_paths_and_names(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out where the data lie and how their files are named: loggers may carry the rest off the machine."""
    data = config.get("data") or {}
    local = ("folder", "patient", "cache", "generated")
    kept = {name: value for name, value in (data.get("init_args") or {}).items() if name not in local}
    return {**config, "data": {**data, "init_args": kept}} if data else config


def _option_error(text: str) -> str:
    """Return one sentence of what jsonargparse says of an option, nested as deep as the classes it tried."""
    if unknown := re.search(r"Problem with given class_path '([^']+)':\s+Option '([^']+)' is not accepted", text):
        return f"{unknown[1]} has no option {unknown[2]}; see --help, or --print_config for those that there are."
    keys = list(re.finditer(r'Parser key "([^"]+)"', text))
    about = text[keys[-1].end() :] if keys else ""
    given = re.search(r"(?:Got|Given) value: ([^\n]+)", about)
    if given is None:
        return " ".join(text.split())
    wanted = re.findall(r"Expected an? (.+?)(?:\. Got value: [^\n]+)?$", about[: given.end()], re.MULTILINE)
    plain = [re.sub(r"<class '([^']+)'>", r"\1", one).replace("NoneType", "null") for one in wanted]
    plain = [re.sub(r"typing\.Literal\[(.+)\]", r"one of \1", one) for one in plain]
    option = ".".join(key[1] for key in keys)
    return f"--{option} is {given[1]}, but must be {' or '.join(plain) or 'of another kind'}."


def _reason(error: Exception) -> str:
    """What a class had against its arguments; jsonargparse wraps it into all that it has tried."""
    wrapped = re.search(r"Errors:\n\s*- ([^\n]+)", str(error))
    return wrapped[1] if wrapped else str(error)


def _with_home(value: Any) -> Any:
    if isinstance(value, Namespace):
        value = value.clone()
        for name, one in vars(value).items():
            value[name] = _with_home(one)
        return value
    return [_with_home(one) for one in value] if isinstance(value, list) else with_home(value)


def _listed(plugins: Any) -> list[Any]:
    return list(plugins) if isinstance(plugins, (list, tuple)) else [plugins] if plugins else []


def _resolve_pretrained(config: Namespace, data_hash: str | None) -> str:
    """Put pretrained folders in the place of roots; return the hash of the weights that are built upon."""
    hashes = []
    for key, root in _stages(config).items():
        folder = str(runs.newest_pretrained(root, data_hash if key == "autoencoder" else None))
        config.model.init_args[key] = folder
        hashes.append(runs.weights_hash(folder))
        rank_zero_info(f"Builds on {folder}.")
    return "-".join(hashes)


def _stages(config: Namespace) -> dict[str, str | Path]:
    """Return the folders or roots of trained stages that a model builds on, by its arguments."""
    arguments = config.model.get("init_args") or Namespace()
    given = {key: arguments.get(key) for key in ("autoencoder", "folder")}
    return {key: value for key, value in given.items() if isinstance(value, (str, Path))}


def _new_folder(options: runs.RunOptions) -> Path:
    """Return the folder of what is generated, which the first process makes."""
    shared = _shared_folder()
    if shared is not None:
        return shared
    if _launched_from_outside() and options.name is None:
        raise RuntimeError(_NO_NAME)
    if _rank() != 0:
        return Path(str(options.root)) / str(options.name)
    return runs.create_run(str(options.root), name=options.name).folder


def _named_run(folder: Path, options: runs.RunOptions, key: str, data_hash: str) -> runs.Run:
    known = next((run for run in runs.list_runs(folder.parent) if run.folder == folder), None)
    if _rank() != 0:
        return known or runs.Run(folder, {})  # the first process makes and checks it
    if known is None or not options.resume:
        return runs.create_run(folder.parent, key, data_hash, name=folder.name)
    if known.record.get("fingerprint") != key:
        raise ValueError(f"Run {folder} has another configuration or other data: choose another --run.name.")
    return known


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0))


def _shared_folder() -> Path | None:
    shared = os.environ.get(_SHARED_RUN)
    return Path(shared) if shared and _rank() != 0 else None


def _launched_from_outside() -> bool:
    environments = [kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()]
    return any(environment.world_size() > 1 for environment in environments)


def _limits(trainer: Namespace) -> list[str]:
    return [f"{name}={trainer[name]}" for name in ("max_steps", "max_epochs", "max_time")]
