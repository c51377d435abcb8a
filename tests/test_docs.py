"""The documentation against the code: commands, flags, fields, links and parameter counts."""

import importlib
import math
import pathlib
import re
import shlex
import string
import sys

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from unclip import errors
from unclip.files import shipped
from unclip.training.plan import make_plan

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = ("srun",)
POSITIONAL = ("convert", "index", "data-bench", "inspect")  # verbs that take paths beside flags
CONFIG = re.compile(r"configs/(\w+)\.py:([\w/@.,=-]*[\w])")


def commands(text):
    """[tokens after `unclip`] of every ```sh block, variables of the block's page filled in."""
    values, found = {}, []
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            tokens = shlex.split(line, comments=True)
            tokens = [string.Template(token).safe_substitute(values) for token in tokens]
            while tokens and (tokens[0] in ("export", *LAUNCHERS) or "=" in tokens[0]):
                name, equals, value = tokens.pop(0).partition("=")
                values |= {name: value} if equals else {}
            if tokens[:1] == ["unclip"]:
                found.append(tokens[1:])
    return found


COMMANDS = [
    pytest.param(tokens, id=f"{page.name}-{number}-{'-'.join(tokens[:1])}")
    for page in PAGES
    for number, tokens in enumerate(commands(page.read_text()))
]


@pytest.fixture(scope="module")
def flags_of():
    """{verb: {flag: kind}} of every verb, from the kept texts of --help.

    tests/verbs/test_help.py sees to it that they are what the verbs print.
    """
    found = {}
    for path in (ROOT / "tests" / "verbs" / "help").glob("*.txt"):
        found[path.stem] = dict(re.findall(r"^  --(\w+)  (.+)$", path.read_text(), re.MULTILINE))
    return found


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def split_flags(tokens, kinds, verb=None):
    """(flags of the verb, config overrides) of a command; anything else fails."""
    own, overrides = {}, []
    tokens = list(tokens)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("-") and verb in POSITIONAL:
            continue
        match = re.fullmatch(r"--([\w.]+)(?:=(.*))?", token, re.DOTALL)
        assert match, f"{token!r} is no flag"
        name, value = match.groups()
        if "." in name:
            overrides.append(token)
            continue
        if name not in kinds and name.removeprefix("no") in kinds:
            name = name.removeprefix("no")
            assert kinds[name] == "bool" and value is None, token
        assert name in kinds, f"there is no flag --{name}: {', '.join(kinds)}"
        if value is None and kinds[name] != "bool":
            assert tokens and not tokens[0].startswith("--"), f"--{name} wants a value"
            value = tokens.pop(0)
        choices = kinds[name].split("|")
        assert len(choices) == 1 or value in choices, f"--{name} {value}"
        if kinds[name].endswith("int"):
            int(value)
        own[name] = value
    return own, overrides


@pytest.mark.parametrize("tokens", COMMANDS)
def test_commands_parse(tokens, flags_of, at_root, monkeypatch):
    verb, *rest = tokens
    own, overrides = split_flags(rest, flags_of[verb], verb)
    if "config" not in own:
        assert not overrides, f"{overrides} without --config"
        return
    # The parser of the verbs itself: unknown fields, values of another type and bad presets fail.
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    argv = [verb, f"--config={shipped.find_config(own['config'])}", *overrides]
    monkeypatch.setattr(sys, "argv", argv)
    values(argv)
    config = holder.value
    if config.stage == "evaluate":
        return
    assert config.total_steps > 0
    assert "runs/" in own.get("workdir", "runs/")
    for patterns in (config.input.shards, config.input.held_out):
        known = (".tar", "-index")  # an index folder is named so on the pages
        assert isinstance(patterns, tuple)
        assert all(p.endswith(known) or p.startswith("tfds:") for p in patterns)


def test_the_pages_show_commands():
    verbs = {param.values[0][0] for param in COMMANDS}
    assert {"train", "doctor", "export", "generate"} <= verbs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_configs_build(page, at_root):
    for name, argument in set(CONFIG.findall(page.read_text())):
        config = importlib.import_module(f"configs.{name}").get_config(argument)
        assert config.stage == name


def slug(heading):
    """A heading's anchor, as Markdown viewers make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not re.search(r"https?://|www\.", page.read_text())
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links to {target}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f"]({page.name})" in index


def ticked(page):
    """Every word in backticks on a page, `a.b` also as its last part."""
    words = re.findall(r"[\w.:/@-]+", " ".join(re.findall(r"`([^`\n]+)`", page.read_text())))
    return {part for word in words for part in (word, word.rpartition(".")[2])}


@pytest.mark.parametrize("name", ["clip", "prior", "decoder", "upsampler", "evaluate"])
def test_every_field_is_explained(name, at_root):
    module = importlib.import_module(f"configs.{name}")
    words = ticked(ROOT / "docs" / f"{name}.md")
    words |= ticked(ROOT / "docs" / "training.md") if name != "evaluate" else set()
    arguments = {"prior": ["emoji", "emoji,kind=ar"], "evaluate": ["emoji", "scenes", "coco"]}
    for argument in arguments.get(name, ["emoji"]):
        config = module.get_config(argument)
        missing = leaves(config.to_dict()) - words
        assert not missing


def leaves(fields):
    """Names of all fields that hold a value, at any depth."""
    below = [leaves(value) for value in fields.values() if isinstance(value, dict) and value]
    own = {key for key, value in fields.items() if not isinstance(value, dict) or not value}
    return own.union(*below)


@pytest.mark.parametrize("name", ["clip", "prior", "decoder", "upsampler"])
def test_every_preset_is_named(name, at_root):
    models = importlib.import_module(f"unclip.models.{name}")
    assert set(models.PRESETS) <= ticked(ROOT / "docs" / f"{name}.md")


def table():
    """{config: trained parameters} of the README's table."""
    rows = re.findall(
        r"^\|[^|]+\| `(configs/[^`]+)` \| ([^|]+) \|$",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    count = lambda cell: sum(int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{4,}", cell))
    return {config: count(cell) for config, cell in rows}


def test_the_table_holds_every_published_preset():
    assert len(table()) == 17
    named = {CONFIG.fullmatch(config).groups() for config in table()}
    for name in ("clip", "prior", "decoder", "upsampler"):
        presets = importlib.import_module(f"unclip.models.{name}").PRESETS
        published = {preset for preset in presets if not preset.startswith("emoji")}
        assert published <= {argument for stage_name, argument in named if stage_name == name}


# U-Nets take up to two seconds each to trace; tests/models counts those of Karlo.
@pytest.mark.parametrize("argument", [c for c in table() if re.search("clip|prior", c)])
def test_parameter_counts(argument, at_root):
    name, preset = CONFIG.fullmatch(argument).groups()
    config = importlib.import_module(f"configs.{name}").get_config(preset)
    config.arch.fold = True  # the same parameters, quicker to trace
    task = make_plan(config, shapes_only=True).task
    shapes = jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in shapes) == table()[argument]


def test_exit_codes():
    codes = {kind.exit_code for kind in errors.UnclipError.__subclasses__()}
    assert codes == {70, 74, 75, 78}
    for page in ("training.md", "runbook.md"):
        text = (ROOT / "docs" / page).read_text()
        assert codes <= {int(code) for code in re.findall(r"^\| (\d+) ?\|", text, re.MULTILINE)}


def test_the_rooms_files_are_there():
    """Every file that docs/architecture.md names, and every folder of the README's tree."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:\w+/)+\w+\.\w+)`", text))
    assert len(named) > 40
    gone = [n for n in named if not any((ROOT / top / n).exists() for top in ("", "unclip"))]
    assert not [name for name in gone if "NAME" not in name and "STAGE" not in name]
    tree = (ROOT / "README.md").read_text().partition("## What is where")[2].split("```")[1]
    rooms = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    here = {path.name for path in (ROOT / "unclip").iterdir() if (path / "__init__.py").exists()}
    assert set(rooms) == here
