"""`unclip VERB …`: finds the verb's module and runs it; says in one line what went wrong.

The verbs are the steps from caption shards to pictures: train the stages, export them as one model,
generate, evaluate. Each is an absl app in a module of its own
under `unclip/verbs`, with a `main(argv)`. Nothing heavy is imported here, so `unclip --help` is
fast and a mistyped flag is reported before an accelerator is initialised.

Exit codes: 0 done, 70 numerics, 74 input or output, 75 stopped and resumable, 78 configuration,
130 interrupted, 141 the reader of our output was closed.
"""

import ast
import contextlib
import difflib
import errno
import importlib
import importlib.util
import os
import pathlib
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from unclip import __version__, errors
from unclip.files import paths, shipped
from unclip.runtime import compiled

VERBS = {
    "train": "train one stage: clip, prior, decoder or an upsampler",
    "export": "gather trained stages into one model folder",
    "generate": "make pictures from captions or pictures",
    "classify": "which of some labels fits a picture, by CLIP",
    "search": "which pictures of a folder or of shards fit a caption, by CLIP",
    "inspect": "what a picture's recipe says",
    "evaluate": "measure a model and write a report",
    "metrics": "compare two sets of pictures: FID, KID, CLIP score, …",
    "embed": "write CLIP embeddings of shards",
    "convert": "read and write other people's model formats",
    "index": "index shards so that training can start at any sample",
    "data-bench": "measure how fast shards are read and decoded",
    "compile": "compile a training step for hardware you do not have here",
    "studio": "make pictures in the browser",
    "doctor": "say what a config would run, and on what, before it runs",
}
_IO_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# Mappings of a config whose names are the user's own.
_USERS_NAMES = ("input.where", "input.held_out_where")
_RESUMABLE = ("train", "embed", "evaluate")
_TEXT = ("prompt", "from_prompt", "labels")  # flags that are no paths
_HELP = ("-h", "-help", "--help", "-?", "--helpshort")
_VERSION = ("-version", "--version")
# Flags of every verb.
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "folder that keeps compiled programs for the next start, or off; default: "
    f"${compiled.VARIABLE}, else unclip/compiled in the user's folder of caches",
)


def available() -> dict[str, str]:
    """The verbs whose module exists in this installation, with a line about each."""
    return {verb: line for verb, line in VERBS.items() if importlib.util.find_spec(_module(verb))}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `unclip VERB …`. `argv` excludes the program's name; None takes `sys.argv`. Exits."""
    args = list(sys.argv[1:] if argv is None else argv)
    verbs = available()
    if args and args[0] in _VERSION:
        with _readers_may_leave():
            print(f"unclip {__version__}")
        sys.exit(0)
    if not args or args[0] in (*_HELP, "help"):
        width = max(map(len, verbs), default=0)
        lines = [f"  {verb:<{width}}  {line}" for verb, line in verbs.items()]
        with _readers_may_leave():
            print(
                "usage: unclip VERB [flags]\n",
                *lines,
                "\nunclip VERB --help shows a verb's flags.",
                sep="\n",
                file=sys.stdout if args else sys.stderr,
            )
        sys.exit(0 if args else errors.ConfigError.exit_code)
    verb, *rest = args
    if verb not in verbs:
        _fail("", errors.unknown("verb", verb, verbs))
    if verb in _RESUMABLE:
        _leave_on_sigterm(verb)
    try:
        module = importlib.import_module(_module(verb))
    except ModuleNotFoundError as error:
        if (error.name or "unclip").partition(".")[0] == "unclip":
            raise
        _fail(verb, errors.ConfigError(f"needs the Python package {error.name!r}: install it"))
    except errors.UnclipError as error:
        _fail(verb, error)
    # ml_collections looks for overrides such as --config.total_steps in sys.argv itself.
    sys.argv = [f"unclip-{verb}", *rest]
    run_app(module.main)


def run_app(main: Callable[[list[str]], Any]) -> NoReturn:
    """Runs an absl app on `sys.argv` and exits with a documented code.

    Args:
      main: takes [program, positional arguments…] with flags parsed; its return value is the exit
        code. Its module defines the flags.

    An `UnclipError`, a flag that does not parse, an error in a config file and a disk that is full
    or not writable give one line on stderr. Anything else is our defect and keeps its traceback.
    """
    spec = sys.modules[main.__module__].__spec__
    name = spec.name if spec else pathlib.Path(sys.argv[0]).stem
    verb = name.rpartition(".")[2].replace("_", "-")
    # The libraries below report every file they write at INFO; --verbosity=0 shows it.
    flags.FLAGS.set_default("verbosity", logging.WARNING)
    logging.set_verbosity(logging.WARNING)
    try:
        with _readers_may_leave():
            app.run(_without_usage(main), flags_parser=lambda args: _parse(main, verb, args))
    except errors.UnclipError as error:
        _fail(verb, error)
    except KeyboardInterrupt:
        print(f"unclip {verb}: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in _IO_ERRNOS:
            raise
        where = f": {error.filename}" if error.filename else ""
        _fail(verb, errors.DataError(f"{error.strerror}{where}"))
    sys.exit(0)


def _leave_on_sigterm(verb: str) -> None:
    """Ends with the code of a job that can be resumed, until `distributed.listen` knows better.

    Imports and the first words with other processes take seconds, in which nothing is done yet.
    """

    def leave(number, _frame):
        said = f"unclip {verb}: {signal.Signals(number).name} before it began"
        print(f"{said}; the same command starts it", file=sys.stderr, flush=True)
        os._exit(errors.Stopped.exit_code)  # an exception may be lost in what is being imported

    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, leave)


def refuse_idle(idle: Mapping[str, str]) -> None:
    """Refuses flags that were given and would have no effect.

    Args:
      idle: {flag: why it has none}; a flag that was not given may stand in it.

    Raises:
      ConfigError: names all of them.
    """
    wrong = [
        f"--{name} has no effect: {why}" for name, why in idle.items() if flags.FLAGS[name].present
    ]
    if wrong:
        raise errors.ConfigError("; ".join(wrong))


@contextlib.contextmanager
def _readers_may_leave() -> Iterator[None]:
    """Ends as SIGPIPE would, quietly, when nobody reads our output any more (`unclip … | head`)."""
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()  # what is short is only written here
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit, so point it elsewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _module(verb: str) -> str:
    return f"unclip.verbs.{verb.replace('-', '_')}"


def _fail(verb: str, error: errors.UnclipError) -> NoReturn:
    message = " ".join(error.message.split())
    print(f"unclip {verb}: {message}" if verb else f"unclip: {message}", file=sys.stderr)
    if error.table:
        print(error.table, file=sys.stderr)
    sys.exit(error.exit_code)


def _without_usage(main: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
    """`main` with a `UsageError` as one line, to which absl would add pages of flags."""

    def run(argv: list[str]) -> Any:
        compiled.keep(_CACHE.value)
        try:
            return main(argv)
        except app.UsageError as error:
            raise errors.ConfigError(str(error)) from error

    return run


def _parse(main: Callable, verb: str, argv: Sequence[str]) -> list[str]:
    """Parses absl and config flags; every mistake becomes a `ConfigError`."""
    # absl lists the flags of a module run by `python -m` under the program's name.
    module = sys.argv[0] if main.__module__ == "__main__" else main.__module__
    of_all = {flag.name: flag for flag in flags.FLAGS.get_flags_for_module(__name__)}
    own = {flag.name: flag for flag in flags.FLAGS.get_flags_for_module(module)}
    before_dashes = argv[: argv.index("--")] if "--" in argv else argv
    if any(arg in _HELP for arg in before_dashes[1:]):
        _print_help(verb, sys.modules[main.__module__].__doc__, own, of_all)
        sys.exit(0)
    own |= of_all
    argv, configs = list(argv), []
    for flag, position, value in _config_files(before_dashes):
        found = _find_config(flag, value)
        configs.append((flag, found))
        argv[position] = argv[position].removesuffix(value) + found
    added = {}
    try:
        for flag, found in configs:
            argv, added[flag.name] = _overrides(argv, flag.name, flag.parser.parse(found))
        sys.argv = argv  # ml_collections looks for --config and its overrides there
        rest = flags.FLAGS(argv)
        for flag, _ in configs:
            _add_fields(flag.value, added[flag.name])
        for flag in own.values():
            if flag.name not in _TEXT and isinstance(flag.value, str | list):
                flag.value = paths.expanded(flag.value)
        return paths.expanded(rest)
    except errors.UnclipError:
        raise
    except Exception as error:  # config files are the user's Python and may raise anything
        chain = list(_chain(error))
        for cause in chain:
            if isinstance(cause, errors.UnclipError):
                raise cause from error
        for cause in chain:
            place = _place(cause, [value.partition(":")[0] for _, value in configs])
            if place:
                message = f"{place}: {type(cause).__name__}: {cause}"
                raise errors.ConfigError(message) from error
        found = _unknown_field(before_dashes, configs)
        if found:
            raise found from error
        if isinstance(error, flags.Error):
            raise _flag_error(error, own) from error
        if isinstance(error, TypeError | ValueError | LookupError | OSError):
            raise errors.ConfigError(str(error)) from error
        raise


def _flag_error(error: flags.Error, own: Mapping[str, flags.Flag]) -> errors.ConfigError:
    if isinstance(error, flags.UnrecognizedFlagError):
        given = error.flagname
        config = given.partition(".")[0]
        if "." in given and config in own:
            return errors.ConfigError(f"--{given} wants --{config}=FILE before it")
        return errors.unknown("flag", f"--{given}", [f"--{name}" for name in own])
    message = str(error)
    required = re.match(r"flag --([\w.]+)=None: Flag --\1 must have a value", message)
    if required:
        return errors.ConfigError(f"--{required[1]} is required")
    # absl's enum message: "flag --mode=x: value should be one of <a|b>".
    enum = re.match(r"flag --([\w.]+)=(.*): value should be one of <(.*)>$", message, re.DOTALL)
    if enum:
        return errors.unknown(f"--{enum[1]}", enum[2], enum[3].split("|"))
    message = message.removeprefix("flag ")
    for said, expected in _EXPECTED.items():
        if said in message:
            place = message.partition(said)[0].rstrip("(' :")
            several = isinstance(own.get(place.strip("-").partition("=")[0]), flags.MultiFlag)
            once = "; repeat the flag for several" if several else ""
            return errors.ConfigError(f"{place}: expected {expected}{once}")
    return errors.ConfigError(message)


# How the libraries' parsers say what they do not take -> what they do take.
_EXPECTED = {
    "invalid literal for int()": "a whole number",
    "could not convert string to float": "a number",
    "Non-boolean argument to boolean flag": "true or false",
    "Failed to parse": "fields and their values, such as \"{'field': 'value'}\"",
}


def _config_files(args: Sequence[str]) -> Iterator[tuple[flags.Flag, int, str]]:
    """(flag, number of the argument that ends in the value, value) of every config named."""
    module = sys.modules.get("ml_collections.config_flags.config_flags")
    if module is None:
        return
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if not isinstance(flag.parser, module.ConfigFileFlagParser):
            continue
        for position, arg in enumerate(args[1:], 1):
            match = re.fullmatch(rf"--?{re.escape(name)}(?:=(.*))?", arg, re.DOTALL)
            if match and match[1] is not None:
                yield flag, position, match[1]
            elif match and position + 1 < len(args):
                yield flag, position + 1, args[position + 1]


def _find_config(flag: flags.Flag, value: str) -> str:
    """`shipped.find_config`, and what its file imports can be found."""
    # ml_collections reports a missing file only when a field is first used, with a long text.
    try:
        found = shipped.find_config(paths.expanded(value))
    except errors.ConfigError as error:
        raise errors.ConfigError(f"--{flag.name}: {error.message}") from error
    # Config files import their neighbours, and ours, as `configs.NAME`, wherever a command is run.
    file = pathlib.Path(found.partition(":")[0])
    for root in (str(shipped.ROOT), str(file.resolve().parents[1])):
        if root not in sys.path:
            sys.path.insert(0, root)
    return found


def _overrides(argv: Sequence[str], name: str, config: Any) -> tuple[list[str], dict[str, tuple]]:
    """(arguments, {new field: its values}): overrides that ml_collections would not understand.

    A field that is a list takes `a,b`, `"('a', 'b')"` or the flag several times; it is passed on
    as one Python tuple. A field that a mapping of the user's names does not have yet is taken out.
    """
    out, lists, added = [], {}, {}
    rest = iter(enumerate(argv))
    start = next(n for n, arg in enumerate(argv) if re.match(rf"--?{re.escape(name)}(=|$)", arg))
    end = argv.index("--") if "--" in argv else len(argv)
    for number, arg in rest:
        match = re.fullmatch(rf"--?{re.escape(name)}\.([\w.]+)(?:=(.*))?", arg, re.DOTALL)
        field = match[1] if match and start < number < end else ""
        old = _value(config, field)
        new = old is None and field.rpartition(".")[0] in _USERS_NAMES
        if not isinstance(old, tuple) and not new:
            out.append(arg)
            continue
        text = next(rest, (0, ""))[1] if match[2] is None else match[2]
        values = _list(f"--{name}.{field}", text, old or ())
        if new or field in added:
            added[field] = added.get(field, ()) + values
        elif field in lists:
            lists[field] = lists[field][0], lists[field][1] + values
        else:
            lists[field] = len(out), values
            out.append("")
    for field, (place, values) in lists.items():
        out[place] = f"--{name}.{field}={values!r}"
    return out, added


def _value(config: Any, field: str) -> Any:
    """What a config has at a dotted name, None for nothing."""
    for step in field.split("."):
        if not hasattr(config, "keys") or step not in config:
            return None
        config = config[step]
    return config


def _list(flag: str, text: str, old: tuple) -> tuple:
    """The values of a list on the command line.

    Args:
      old: the list that they replace, of whose kind they must be.

    Raises:
      ConfigError: names the flag and the forms that are understood.
    """
    example = old[:2] or ("a", "b")
    expected = errors.ConfigError(
        f'{flag}={text}: expected a list such as {",".join(map(str, example))} or "{example!r}"'
    )
    try:
        values = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        values = paths.listed(text)
        bracketed = text.strip().startswith(("(", "[")) and "," in text
        if bracketed or any(part[0] in "'\"" or part[-1] in "'\"" for part in values):
            raise expected from None
    if isinstance(values, set):  # {1,2} is a range of shards
        values = paths.listed(text)
    values = tuple(values) if isinstance(values, list | tuple) else (values,)
    of = lambda kind, row: all(isinstance(value, kind) for value in row)
    if old and any(of(kind, old) and not of(kind, values) for kind in (str, int | float)):
        raise expected
    return values


def _add_fields(config: Any, added: Mapping[str, tuple]) -> None:
    for field, values in added.items():
        parent, _, leaf = field.rpartition(".")
        node = _value(config, parent)
        words = {"true": True, "false": False, "null": None}
        with node.unlocked():
            node[leaf] = tuple(words.get(v, v) if isinstance(v, str) else v for v in values)


def _unknown_field(
    args: Sequence[str], configs: Sequence[tuple[flags.Flag, str]]
) -> errors.ConfigError | None:
    """Finds the override that names no field of its config, and the fields that look like it."""
    for flag, value in configs:
        pattern = re.compile(rf"--?(no)?{re.escape(flag.name)}\.([^=]+)")
        config = flag.parser.parse(value)
        for match in filter(None, map(pattern.match, args[1:])):
            given, node = match[2], config
            steps = re.findall(r"[^.\[\]]+", given)
            for depth, step in enumerate(steps):
                if isinstance(node, list | tuple) and step.isdigit() and int(step) < len(node):
                    node = node[int(step)]
                    continue
                if hasattr(node, "keys") and step in node:
                    node = node[step]
                    continue
                choices = list(node.keys()) if hasattr(node, "keys") else []
                return _no_field(flag.name, given, steps[:depth], step, choices, config)
    return None


def _no_field(
    name: str, given: str, parents: list[str], step: str, choices: list[str], config: Any
) -> errors.ConfigError:
    prefix = ".".join([name, *parents])
    # The same name in another place ("lr" for "optim.lr") is a likelier mistake than a misspelling.
    leaf = given.rpartition(".")[2]
    elsewhere = [path for path in _paths(config) if path.rpartition(".")[2] == leaf]
    near = [f"{prefix}.{choice}" for choice in difflib.get_close_matches(step, choices, n=3)]
    if not near:
        near = [f"{name}.{path}" for path in elsewhere[:3]]
    hint = f": did you mean {' or '.join(f'--{path}' for path in near)}?" if near else ""
    listed = f" valid below --{prefix}: {', '.join(sorted(choices))}" if choices else ""
    said = f"--{name}.{given}: the config has no such field"
    return errors.ConfigError(f"{said}{hint}{';' if choices and not hint else ''}{listed}")


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node.keys() if hasattr(node, "keys") else ():
        path = f"{prefix}{key}"
        yield path
        yield from _paths(node[key], path + ".")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, outermost first: libraries wrap the errors of their callees."""
    while error is not None:
        yield error
        error = error.__cause__ if error.__cause__ is not None else error.__context__


def _place(error: BaseException, paths: Sequence[str]) -> str | None:
    """FILE:LINE where an error arose in or below a config file; None when it arose elsewhere."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    real = {os.path.realpath(path) for path in paths}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if os.path.realpath(frame.filename) in real:
            return f"{frame.filename}:{frame.lineno}"
    return None


def _print_help(
    verb: str, doc: str | None, own: Mapping[str, flags.Flag], of_all: Mapping[str, flags.Flag]
) -> None:
    print(f"usage: unclip {verb} [flags]\n\n{(doc or '').strip()}\n\nflags:")
    _print_flags(own)
    print("\nflags of every verb:")
    _print_flags(of_all)


def _print_flags(own: Mapping[str, flags.Flag]) -> None:
    for flag in sorted(own.values(), key=lambda flag: flag.name):
        choices = getattr(flag.parser, "enum_values", None)
        kind = "|".join(choices) if choices else flag.flag_type()
        # absl repeats an enum's choices at the start of its help.
        about = (flag.help or "").removeprefix(f"<{kind}>: ")
        default = "" if flag.default in (None, [], "") else f" (default: {flag.default})"
        print(f"  --{flag.name}  {kind}")
        print(textwrap.indent(textwrap.fill(" ".join(about.split()) + default, 90), " " * 6))
