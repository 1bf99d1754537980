"""Shared code of the binaries: config flags whose mistakes are explained, and these exit codes.

0          done
2          a mistake of the user's: an unknown flag, field, name or file; one message, no traceback
3          the loss was not finite
4          a checkpoint could not be written
5          another process of the run did not come
130, 143   stopped by Ctrl-C or SIGTERM, after saving (with several processes always 143)
134        aborted by JAX, since another process of the run died
141        the reader of standard output has exited, as in `... | head`
1          any other error, with its traceback
"""

import ast
import contextlib
import difflib
import importlib.util
import os
import re
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import common
from experiments.launch import distributed
from experiments.training import run_record
from experiments.training.checkpoints import SaveFailed, is_disk_full
from kernels_pallas.dispatch import absent_tpu
from seqmodels.fields import expected

_ROOT = Path(__file__).resolve().parents[2]
_OUR_CODE = tuple(
    _ROOT / name for name in ("experiments", "seqmodels", "kernels_pallas", "configs", "tests")
)
_NO_BACKEND = re.compile("Unable to initialize backend|Unknown backend")
_HELP = r"--?(help(short|full|xml)?|\?)"


class _Parser(flags.ArgumentParser):
    """Parser of the text given for a config field, whose errors name the expected type."""

    def __init__(self, parser: flags.ArgumentParser, kind: type, optional: bool):
        self._parser, self._optional = parser, optional
        self._expected = expected(kind | None if optional else kind)

    def parse(self, argument):
        if self._optional and argument in (None, "None"):
            return None
        try:
            return self._parser.parse(argument)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected {self._expected}") from error

    def flag_type(self):
        return self._expected


class _TupleParser(flags.ArgumentParser):
    """Parser of a tuple's text, such as "(8, 8)"."""

    def parse(self, argument):
        value = argument
        if isinstance(argument, str):
            try:
                value = ast.literal_eval(argument)
            except SyntaxError as error:
                raise ValueError(str(error)) from error
        if not isinstance(value, tuple | list):
            raise ValueError(f"{argument} is no tuple")
        return tuple(value)


config_flags.register_flag_parser_for_type(
    tuple | None, _Parser(_TupleParser(), tuple, optional=True)
)
for _kind, _parser in (
    (bool, flags.BooleanParser()),
    (int, flags.IntegerParser()),
    (float, flags.FloatParser()),
    (str, flags.ArgumentParser()),
):
    # configs/common.py gives optional fields these types.
    _optional_kind = _kind | int | None if _kind is float else _kind | None
    config_flags.register_flag_parser_for_type(_kind, _Parser(_parser, _kind, optional=False))
    config_flags.register_flag_parser_for_type(
        _optional_kind, _Parser(_parser, _kind, optional=True)
    )


class UserError(ValueError):
    """Error that is a user's mistake; its message is shown without a traceback."""


class NonFiniteLoss(RuntimeError):
    """Error of a loss, gradient or parameter that is not finite."""


class Stopped(SystemExit):
    """Exit of a run that a signal ended, after saving; its exit code is 128 + signal."""


def run(
    main: Callable[[Sequence[str]], int | None],
    config_from: str | Callable[[Callable[[str], str | None]], ConfigDict] | None = "file",
    many_hosts: bool = False,
) -> None:
    """Runs a binary's main(argv) by absl's app.run, with the exit codes of this module.

    config_from: where the config comes from; --config.x.y=value overrides its fields. "file": the
      binary's own flag --config=path.py[:argument]. "workdir": the run in the folder of --workdir.
      A function: it is given a function from a flag's name to its text or None, and returns the
      config. None: there is no config.
    many_hosts: whether the binary defines the flags of `distributed` and runs main in its
      `session`.
    """
    absent_tpu.pass_over()
    if many_hosts:
        distributed.define_flags()

    def quiet_main(argv):
        if _flag_value(sys.argv, "verbosity") is None:  # absl's own default for binaries is INFO
            logging.set_verbosity(logging.WARNING)
        # Orbax logs a failed save several times, with tracebacks, and then raises it.
        logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)
        with distributed.session(flags.FLAGS) if many_hosts else contextlib.nullcontext():
            return main(argv)

    try:
        try:
            app.run(
                lambda argv: _explained(quiet_main, argv),
                flags_parser=lambda argv: _explained(parse_flags, argv, config_from),
            )
        except SystemExit:
            sys.stdout.flush()  # here, where a reader that has left is no error
            raise
    except (Exception, KeyboardInterrupt) as error:
        code, message = _exit_code(error)
        if message is None and not jax.distributed.is_initialized():
            raise
        if message is None:
            traceback.print_exc()
            if isinstance(error, jax.errors.JaxRuntimeError):
                message = "this may follow from the end of another process: see its log"
        if message:
            print(f"error: {distributed.label()}{message}", file=sys.stderr)
        distributed.end(code)


def parse_flags(argv: Sequence[str], config_from="file") -> list[str]:
    """Parses a binary's flags, overrides of its config among them; returns the other arguments.

    config_from: where the config comes from, as in `run`.
    Raises UserError for an unknown flag or field, or a value that is not of the field's type.
    """
    try:
        if config_from is None or any(re.fullmatch(_HELP, text) for text in argv[1:]):
            return flags.FLAGS(argv)
        if config_from == "file":
            config = load_config(_flag_value(argv, "config") or "")
        else:
            if config_from == "workdir":
                config = run_record.load_config(_flag_value(argv, "workdir") or "")
            else:
                config = config_from(lambda name: _flag_value(argv, name))
            config_flags.DEFINE_config_dict("config", config, "overrides of the run's config")
        check_overrides(config, argv)
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(str(error)) from error


def _nobody_reads() -> bool:
    """Returns whether the reader of standard output has exited; if so, redirects it to devnull."""
    output = select.poll()
    output.register(sys.stdout, 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def no_arguments(argv: Sequence[str]) -> None:
    """Raises UserError if the command line has arguments that are not flags."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: flags start with --")


def numbers(flag: str, texts: Sequence[str], kind: type = int, least: float = 1) -> list:
    """Returns a list flag's numbers. Raises UserError for other text and numbers below `least`."""
    try:
        values = [kind(text) for text in texts]
    except ValueError as error:
        raise UserError(
            f"--{flag} is {','.join(texts)}; give numbers with commas between them"
        ) from error
    if wrong := [value for value in values if not value >= least]:
        raise UserError(f"--{flag} has {wrong[0]}; it must be at least {least}")
    return values


def chosen(flag: str, values: Sequence[str], choices: Sequence[str], every: str = "") -> tuple:
    """Returns a list flag's values. Raises UserError for one that is none of the choices.

    every: a value that stands for all choices.
    """
    known = [*choices, every] if every else choices
    for value in values:
        if value not in known:
            raise UserError(f"--{flag}: unknown {value!r}; choose from {', '.join(known)}")
    return tuple(choices if every in values else values)


def output_folder(path: str | Path) -> Path:
    """Creates a folder if missing; returns its path. Raises OSError if it is not writable."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        return path


def load_config(path_and_argument: str) -> ConfigDict:
    """Returns the config of "path.py:argument". Raises UserError if the file has no get_config."""
    path, _, argument = path_and_argument.partition(":")
    if not path:
        raise UserError("give a config: --config=configs/quickstart.py")
    if not Path(path).is_file():
        raise UserError(_no_such_config(path))
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or not re.search(r"\bget_config\b", Path(path).read_text()):
        raise UserError(f"{path} is not a config: a Python file with a function get_config(arg)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*([argument] if argument else []))
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() of {path} returned {type(config).__name__}, not an "
            "ml_collections.ConfigDict"
        )
    return config


def check_overrides(config: ConfigDict, argv: Sequence[str]) -> None:
    """Raises UserError for flags --config.x.y that name an unknown field or a whole section."""
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if not match:
            continue
        dotted, node, walked = match[1], config, "config"
        for name in dotted.split("."):
            name = re.sub(r"\[\d+\]$", "", name)
            if not isinstance(node, ConfigDict) or name not in node:
                raise UserError(_unknown_field(config, dotted, node, name, walked))
            node, walked = node[name], f"{walked}.{name}"
        if isinstance(node, ConfigDict):
            raise UserError(
                f"{walked} is a section; set its fields, one by one: {', '.join(sorted(node))}"
            )


def _unknown_field(config, dotted: str, node, name: str, walked: str) -> str:
    fields = sorted(node.keys()) if isinstance(node, ConfigDict) else []
    renamed = common.RENAMED.get((walked.removeprefix("config."), name))
    near = [f"{walked}.{renamed}"] if renamed else []
    near += [f"{walked}.{match}" for match in difflib.get_close_matches(name, fields, cutoff=0.7)]
    last = dotted.split(".")[-1]
    near += [f"config.{path}" for path in _paths(config) if path.split(".")[-1] == last]
    has = f"it has {', '.join(fields)}" if fields else f"{walked} is a value, not a section"
    return f"unknown config field config.{dotted}: {walked} has no {name!r}; " + (
        f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else has
    )


def _paths(config: ConfigDict, prefix: str = ""):
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _paths(value, f"{prefix}{name}.")


def _no_such_config(path: str) -> str:
    message = f"there is no config file {path} (looked from {Path.cwd()})."
    if Path(path + ".py").is_file():
        return f"{message} Did you mean {path}.py?"
    if (_ROOT / path).is_file():
        return f"{message} It is in {_ROOT}: change to that folder first (cd {_ROOT})."
    if Path(path).is_dir():
        return f"{message} That is a folder; the configs in it: {_configs_in(Path(path))}."
    folder = Path(path).parent if Path(path).parent.is_dir() else _ROOT / "configs"
    near = difflib.get_close_matches(Path(path).name, [p.name for p in folder.glob("*.py")])
    if near:
        return f"{message} Did you mean {' or '.join(str(folder / name) for name in near)}?"
    return f"{message} Configs in {folder}: {_configs_in(folder)}."


def _configs_in(folder: Path) -> str:
    names = [p.name for p in folder.glob("*.py") if p.name not in ("__init__.py", "common.py")]
    return ", ".join(sorted(names)) or "none"


def _flag_value(argv: Sequence[str], name: str) -> str | None:
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            return value if equals else (argv[i + 1] if i + 1 < len(argv) else None)
    return None


def _explained(function, *arguments):
    """Returns function(*arguments). A ValueError or OSError from this repository becomes UserError.

    Those that a library raised are defects, and keep their traceback.
    """
    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = any(raised_in.is_relative_to(code) for code in _OUR_CODE)
        from_system = getattr(error, "errno", None) is not None  # _exit_code names its file
        if isinstance(error, UserError) or from_system or not ours:
            raise
        raise UserError(str(error)) from error


def _exit_code(error: BaseException) -> tuple[int, str | None]:
    """Returns (exit code, message) of an error; None asks for its traceback, "" for silence."""
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return 128 + signal.SIGPIPE, ""
    for kind, code in ((UserError, 2), (NonFiniteLoss, 3), (SaveFailed, 4)):
        if isinstance(error, kind):
            return code, str(error)
    if isinstance(error, OSError) and is_disk_full(error):
        return 4, f"{error}. The run stopped; whole checkpoints are intact"
    if isinstance(error, RuntimeError) and _NO_BACKEND.match(str(error)):  # JAX_PLATFORMS
        return 2, str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return 2, f"{error.filename}: {error.strerror}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return 1, None
