"""The list of what is installed is one, it is pinned, and it covers the package's extras."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from handbook_src.errors import ConfigError
from handbook_src.publish import command, environment
from handbook_src.testing import refuses

REPOSITORY = Path(__file__).resolve().parents[2]
LIST = """name: x
dependencies:
  - python=3.11
  - pip:
      - -c constraints.txt
      # a comment
      - torch
      - triton; sys_platform == "linux"
      - here; sys_platform == "nowhere"
      - -e .
  - later
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "environment.yml").write_text(LIST, "utf8")
    (tmp_path / "constraints.txt").write_text("# pins\ntorch==2.13.0\nTri_ton==3.7.1  # why\n", "utf8")
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch"]\n[tool.x]\na = 1\n', "utf8")
    return tmp_path


def extras():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf8"))["project"]
    named = {"package": project["dependencies"], **project["optional-dependencies"]}
    return [(extra, line) for extra, lines in named.items() for line in lines]


@pytest.mark.parametrize(("extra", "line"), extras())
def test_every_requirement_of_the_package_is_listed_and_pinned_within_its_range(extra, line):
    name, ranges = re.match(r"([\w.-]+)([^;]*)", line).groups()
    listed = {environment.normal(r.name) for r in environment.requirements(REPOSITORY)}
    pins = environment.pins(REPOSITORY)
    assert environment.normal(name) in listed, f"{name} of extra {extra} is not in environment.yml"
    from packaging.specifiers import SpecifierSet

    assert pins[environment.normal(name)] in SpecifierSet(ranges)


def test_every_listed_package_is_pinned_and_torch_comes_first():
    listed = [r.name for r in environment.requirements(REPOSITORY)]
    pins = environment.pins(REPOSITORY)
    assert [name for name in listed if environment.normal(name) not in pins] == []
    assert listed[0] == "torch"
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")


def test_pins_hold_no_build_suffix_path_or_address():
    text = (REPOSITORY / "constraints.txt").read_text("utf8")
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert [p for p in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", p)] == []


def test_the_list_is_read_with_its_platforms(root):
    assert environment.pip_items(root)[0] == "-c constraints.txt"
    assert [str(r) for r in environment.requirements(root)] == [
        "torch", 'triton; sys_platform == "linux"', 'here; sys_platform == "nowhere"',
    ]  # fmt: skip
    assert not environment.requirements(root)[2].applies
    assert environment.pins(root) == {"torch": "2.13.0", "tri-ton": "3.7.1"}


@pytest.mark.parametrize("item", ["torch==2.13.0", "torch>=2", 'torch; python_version < "3.12"'])
def test_versions_stand_in_the_constraints_only(root, item):
    (root / "environment.yml").write_text(LIST.replace("- torch\n", f"- {item}\n"), "utf8")
    with refuses(ConfigError, repr(item)):
        environment.requirements(root)


def test_a_constraint_is_exact(root):
    (root / "constraints.txt").write_text("torch>=2\n", "utf8")
    with refuses(ConfigError, "torch>=2"):
        environment.pins(root)


def test_a_list_without_packages_is_refused(root):
    (root / "environment.yml").write_text("dependencies: []\n", "utf8")
    with refuses(ConfigError, "- pip:"):
        environment.pip_items(root)


@pytest.mark.parametrize(
    ("file", "before", "after", "counts"),
    [
        ("environment.yml", "      - torch\n", "      - torch\n      - more\n", True),
        ("environment.yml", "# a comment", "# another comment", False),
        ("constraints.txt", "2.13.0", "2.13.1", True),
        ("constraints.txt", "# pins", "# all pins", False),
        ("pyproject.toml", '["torch"]', '["torch>=2"]', True),
        ("pyproject.toml", "a = 1", "a = 2", False),
    ],
)
def test_the_stamp_follows_what_is_installed(root, file, before, after, counts):
    first = environment.stamp(root)
    path = root / file
    path.write_text(path.read_text("utf8").replace(before, after), "utf8")
    assert (environment.stamp(root) != first) == counts


def test_the_stamp_follows_python_and_the_folder(root, monkeypatch, tmp_path_factory):
    first = environment.stamp(root)
    moved = tmp_path_factory.mktemp("moved")
    for name in ("environment.yml", "constraints.txt", "pyproject.toml"):
        shutil.copy(root / name, moved)
    assert environment.stamp(moved) != first
    monkeypatch.setattr(sys, "version", "3.99")
    assert environment.stamp(root) != first


def test_this_environment_lacks_nothing_but_says_what_another_would(root, monkeypatch):
    versions = {"torch": "2.13.0+cpu", "triton": "3.7.1", "tri-ton": "3.7.1"}

    def version(name):
        if name not in versions:
            raise environment.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(environment, "version", version)
    monkeypatch.setattr(environment, "linked_to", root.resolve)
    assert environment.missing(root) == []
    versions["torch"] = "2.12.0"
    del versions["triton"]
    assert environment.missing(root) == ['triton; sys_platform == "linux"', "torch==2.13.0 (here 2.12.0)"]
    monkeypatch.setattr(environment, "linked_to", lambda: None)
    assert environment.missing(root)[-1] == "handbook-src (editable, from this folder)"


def test_the_first_step_parses_on_old_pythons():
    for name in ("__main__.py", "__init__.py"):
        ast.parse((REPOSITORY / "handbook_src" / name).read_text("utf8"), feature_version=(3, 7))


def test_an_old_python_gets_a_sentence():
    code = "import runpy, sys; sys.version_info = (3, 9, 1); runpy.run_module('handbook_src', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 1
    assert "needs Python 3.11 or newer, and this is Python 3.9" in run.stderr
    assert "Traceback" not in run.stderr


def test_only_the_standard_library_is_used_before_the_environment_stands():
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import handbook_src.publish.command"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_outside_a_clone_the_command_says_to_clone(tmp_path):
    package = tmp_path / "site" / "handbook_src"
    for name in ("__init__.py", "__main__.py", "errors.py", "publish"):
        source = REPOSITORY / "handbook_src" / name
        package.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, package / name)
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(package.parent)!r})\n"
         "from handbook_src.publish.command import run; sys.exit(run(['book']))"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1
    assert "clone the repository" in run.stderr
    assert "Traceback" not in run.stderr


def test_help_needs_no_environment():
    for line in (["--help"], ["book", "--help"], ["test", "--help"]):
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
             f"from handbook_src.publish.command import run; run({line!r})"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0
        assert "usage: python3 -m handbook_src" in run.stdout


def test_arguments_that_are_not_ours_go_to_pytest():
    options, rest = command.parse(["test", "--jobs", "3", "-k", "rms", "-x", "tests/layers"])
    assert (options.command, options.jobs, rest) == ("test", 3, ["-k", "rms", "-x", "tests/layers"])
    for line in (["book", "-k", "rms"], ["book", "--jobs", "0"], []):
        with pytest.raises(SystemExit):
            command.parse(line)
