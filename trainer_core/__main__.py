"""The trainer without ComfyUI: `python -m trainer_core COMMAND CONFIG.json`; --help lists the commands.

The configuration is one JSON file; see docs/settings.md. Ctrl-C pauses a run, and the same command resumes it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .disk import disk_errors
from .errors import ConfigError, Interrupted, Problems, TrainerError
from .events import VALIDATION_LOSSES, SampleReport, StepReport, Stop
from .packages import REQUIREMENTS

if TYPE_CHECKING:
    from types import FrameType

    from .config import JobConfig
    from .ranks import Ranks

_LOG = logging.getLogger(__name__)
EXIT_OK, EXIT_ERROR, EXIT_STOPPED = 0, 1, 130


class ConsoleObserver:
    """Logs progress. A signal asks the run to pause."""

    def __init__(self) -> None:
        self._stop = Stop.NO
        self._last_line = ("", -1)
        self._notes = set[str]()

    def interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        """Handles SIGINT and SIGTERM: asks for a pause. A second SIGINT ends the process at once."""
        _LOG.warning("Stopping as soon as the work so far is safe. Press Ctrl-C again to stop at once.")
        self._stop = Stop.PAUSE
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_progress(self, phase: str, done: int, total: int) -> None:
        """Logs each tenth of a phase."""
        tenth = 10 * done // total
        if (phase, tenth) != self._last_line:
            self._last_line = (phase, tenth)
            _LOG.info("%s: %d of %d", phase, done, total)

    def on_note(self, text: str) -> None:
        """Logs a note once, because the checks before encoding and the training find the same."""
        if text not in self._notes:
            self._notes.add(text)
            _LOG.info("%s", text)

    def on_open(self, run_dir: Path) -> None:
        """Logs the run folder."""
        _LOG.info("The run folder is %s", run_dir)

    def on_step(self, report: StepReport) -> None:
        """Logs a step."""
        losses = {name.replace("_", " "): getattr(report, name) for name in VALIDATION_LOSSES}
        validation = "".join(f"  {name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        _LOG.info(
            "step %d of %d  loss %.4f  learning rate %.2e  %.2f s%s",
            *(report.step, report.num_steps, report.loss, report.learning_rate, report.seconds, validation),
        )

    def on_samples(self, report: SampleReport) -> None:
        """Logs the grid file and how close the pictures are to the targets."""
        _LOG.info("step %d  pictures %s  %s", report.step, report.grid_file, report.as_text())

    def should_stop(self) -> Stop:
        """PAUSE after a signal."""
        return self._stop


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code of the process."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _quieten_libraries()
    observer = ConsoleObserver()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, observer.interrupt)
    try:
        with disk_errors():
            return int(options.command(options, observer))
    except Interrupted as stopped:
        _LOG.warning("%s", stopped)
        return EXIT_STOPPED
    except TrainerError as error:
        _LOG.error("%s", error)
        return EXIT_ERROR
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "trainer_core":
            raise
        _LOG.error(
            "The package %s is not installed in %s. Use the Python that runs ComfyUI, which has it, or install torch, "
            'torchvision, transformers, pillow and psutil, and then: "%s" -m pip install -r "%s"',
            *(error.name, sys.executable, sys.executable, REQUIREMENTS),
        )
        return EXIT_ERROR


def _quieten_libraries() -> None:
    """Keep out of the console what libraries log about parts of theirs that are not used here."""
    for noisy in ("httpx", "diffusers", "transformers", "torch", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # bitsandbytes' products with 4-bit weights on a CPU; here weights are dequantised first
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)
    warnings.filterwarnings("ignore", message="Failed to load image Python extension")  # torchvision's reader of files
    warnings.filterwarnings("ignore", module="PIL")  # they don't name the file; our notes and errors do


def _job(options: argparse.Namespace) -> JobConfig:
    """CONFIG, which overrides the preset; without it an example in the working directory."""
    from .example import example_job
    from .job import load_job

    if options.config is not None:
        return load_job(options.config, options.set, preset=options.example)
    if options.example:
        return example_job(options.example, Path.cwd(), options.set)
    raise ConfigError("The command has no configuration. Give a JSON file, or an example with --example.")


def _check(options: argparse.Namespace, observer: ConsoleObserver) -> int:
    from .conditioning.report import scale_report
    from .data.pair_check import check_pairs
    from .job import check_job
    from .pictures.check_report import check_report
    from .pictures.contact_sheet import report

    job = _job(options)
    checked = check_job(job, observer)
    for part, dataset in checked.paired:
        check = check_pairs(dataset, job.pair_check, observer, checked_dir=Path(job.cache_dir) / "checked")
        heading = f"# {part.id}\n\n" if job.datasets else ""
        scales = scale_report(dataset, job.model.flavour, part.encoding)
        sys.stdout.write(f"{heading}{report(dataset)}\n\n{check_report(dataset, check)}\n{scales}\n")
    for note in checked.notes:
        observer.on_note(note)
    checked.raise_problems()
    return EXIT_OK


def _caption(options: argparse.Namespace, observer: ConsoleObserver) -> int:
    from .draft_captions import plan_drafts, write_drafts

    job = _job(options)
    parts = {part.id: part.dataset for part in job.parts()}
    plan = plan_drafts(parts, job.model, observer, checked_dir=Path(job.cache_dir) / "checked")
    text = plan.as_text() if options.dry_run else write_drafts(plan, job.caption_drafts, observer)
    sys.stdout.write(f"{text}\n")
    return EXIT_OK


def _encode(options: argparse.Namespace, observer: ConsoleObserver) -> int:
    from .conditioning.report import encoding_report
    from .job import encode_job

    job = _job(options)
    with _ranks(job) as ranks:
        for encoded in encode_job(job, observer, ranks):
            if encoded is not None and ranks.leads:
                _LOG.info(encoding_report(encoded))
                sys.stdout.write(f"{encoded.manifest}\n")
    return EXIT_OK


def _train(options: argparse.Namespace, observer: ConsoleObserver) -> int:
    from .adapters.writer import READERS
    from .job import check_job, encode_parts, time_of_job
    from .run import train_lora

    job = _job(options)
    with _ranks(job) as ranks:
        checked = check_job(job, observer, ranks, continue_kept=options.continue_kept)  # before hours of encoding
        checked.raise_problems()
        for note in checked.notes:
            observer.on_note(note)
        planned, model = checked.planned, checked.model
        assert model is not None
        if time := time_of_job(job, planned, model.size):
            _LOG.info("%s", time)
        encoded, validation = encode_parts(job, planned, observer)
        config = job.train_config(str(encoded.manifest), str(validation.manifest) if validation else "")
        result = train_lora(config, observer, model=model, continue_kept=options.continue_kept, ranks=ranks)
    if result.lora_file is None:
        _LOG.warning("Paused after %d steps. Run the same command to resume.", result.steps_done)
        return EXIT_STOPPED
    if note := READERS[job.lora.lora_type]:
        _LOG.info("%s", note)
    if ranks.leads:
        sys.stdout.write(f"{result.lora_file}\n")
    return EXIT_OK


@contextmanager
def _ranks(job: JobConfig) -> Iterator[Ranks]:
    """The processes that torchrun or accelerate started. Processes other than the leader log only warnings."""
    from .ranks import joined_ranks

    with joined_ranks(job.model.device) as ranks:
        if ranks.leads and ranks.size > 1:
            _LOG.info("Running in %d processes", ranks.size)
        if not ranks.leads:
            logging.getLogger().setLevel(logging.WARNING)
        yield ranks


def _plan(options: argparse.Namespace, observer: ConsoleObserver) -> int:
    from .job import plan_job

    text, fits = plan_job(_job(options), options.vram, observer)
    sys.stdout.write(f"{text}\n")
    return EXIT_OK if fits else EXIT_ERROR


def _sample(options: argparse.Namespace, observer: ConsoleObserver) -> int:
    from PIL import Image

    from .data.images import open_picture
    from .pictures.grid import save_picture
    from .planning.disk_space import DiskUse, check_disk
    from .sample import SampleRequest, check_sample, sample_edit

    job, problems = _job(options), Problems()
    convert = (job.dataset or job.datasets[0].dataset).color_profiles == "convert"
    pictures = [problems.attempt(partial(open_picture, path, convert=convert)) for path in options.reference]
    unread = Image.new("RGB", (64, 64))  # stands for a picture that can't be read, for the checks
    request = SampleRequest(
        model=job.model,
        references=tuple(picture or unread for picture in pictures),
        prompt=options.prompt,
        negative_prompt=job.encoding.validation_negative_prompt,
        preprocessing=job.encoding.preprocessing,
        match_target_res=job.encoding.match_target_res,
        resolution=job.encoding.resolution,
        lora_file=options.lora,
        lora_strength=options.strength,
        sampling=job.validation,
        seed=options.seed,
    )
    problems.attempt(lambda: _refuse_existing(options.out))
    problems.attempt(lambda: check_disk([DiskUse(options.out.absolute().parent, "the picture", 0)]))
    if problems.errors:
        problems.attempt(lambda: check_sample(request))
        problems.raise_all()
    save_picture(sample_edit(request, observer), options.out)
    sys.stdout.write(f"{options.out}\n")
    return EXIT_OK


def _import_simpletuner(options: argparse.Namespace, _observer: ConsoleObserver) -> int:
    from .files import write_atomically
    from .simpletuner.convert import import_simpletuner

    _refuse_existing(options.out)
    imported = import_simpletuner(options.config, options.data, base=options.base, root=Path.cwd(), changes=options.set)
    for line in imported.report:
        _LOG.info("%s", line)
    write_atomically(options.out, f"{json.dumps(imported.values, indent=2, ensure_ascii=False)}\n".encode())
    sys.stdout.write(f"{options.out}\n")
    return EXIT_OK


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"--out {out} exists. Choose another name; nothing is overwritten.")


class _Parser(argparse.ArgumentParser):
    """Says how to change a setting if one is written as an option, as other trainers have it."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with the exit code 2."""
        is_setting = message.startswith("unrecognized arguments: --")
        super().error(f"{message}. To change a setting, write --set NAME=VALUE." if is_setting else message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m trainer_core", description="Train LoRAs for Qwen-Image-Edit.")
    commands = parser.add_subparsers(required=True)
    described = {
        "check": (_check, "Find all that encoding and training would refuse, and print a report on the pairs."),
        "caption": (_caption, "Draft a caption for each pair that has none. No file is replaced."),
        "encode": (_encode, "Encode the dataset and print the manifest's path."),
        "train": (_train, "Encode missing pairs, train, and print the LoRA file's path."),
        "plan": (_plan, "Estimate the VRAM and RAM of training, without loading anything."),
        "sample": (_sample, "Edit one picture with the base model or a LoRA."),
        "import-simpletuner": (_import_simpletuner, "Convert SimpleTuner's config.json to a configuration."),
    }
    for name, (command, text) in described.items():
        sub = commands.add_parser(name, help=text, description=text)
        foreign = name == "import-simpletuner"
        sub.add_argument("config", type=Path, nargs=None if foreign else "?", help="The JSON configuration.")
        if not foreign:
            sub.add_argument("--example", default="", metavar="PRESET", help="Preset for settings that CONFIG lacks.")
        sub.add_argument(
            "--set", action="append", default=[], metavar="NAME=VALUE", help="Change a setting; repeatable."
        )
        sub.set_defaults(command=command)
        if name == "caption":
            sub.add_argument("--dry-run", action="store_true", help="Only list the pairs. Loads and writes nothing.")
        if name == "train":
            sub.add_argument("--continue-kept", action="store_true", help="Continue a run that was ended early.")
        if name == "plan":
            sub.add_argument("--vram", type=float, default=0.0, metavar="GIB", help="VRAM of the card to plan for.")
        if name == "import-simpletuner":
            sub.add_argument("--data", type=Path, help="multidatabackend.json; default: the one that CONFIG names.")
            sub.add_argument("--base", default="", help="The base model's folder, or demo.")
            sub.add_argument("--out", type=Path, default=Path("job.json"), help="The configuration to write.")
        if name == "sample":
            sub.add_argument("--reference", type=Path, nargs="+", required=True, help="One to three pictures.")
            sub.add_argument("--prompt", required=True, help="The edit instruction.")
            sub.add_argument("--out", type=Path, required=True, help="The picture to write.")
            sub.add_argument("--lora", type=Path, help="A LoRA file; default: the base model alone.")
            sub.add_argument("--strength", type=float, default=1.0, help="Strength of the LoRA.")
            sub.add_argument("--seed", type=int, default=0, help="Seed of the sampling noise.")
    return parser


if __name__ == "__main__":
    exit_code = main()
    # Leave without Python's shutdown. It waits up to fifteen seconds for the compiler's processes, and now and then one
    # of torch's threads aborts it, so that torchrun reports a finished run as failed. All files are complete by now.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
