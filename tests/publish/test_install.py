"""Making the environment: fresh, again, interrupted, and on systems that refuse."""

import os
import sys
from pathlib import Path

import pytest

from handbook_src.publish import environment, install
from handbook_src.publish.install import MARK, STAMP, SetupError
from handbook_src.testing import refuses

PEP_668 = "error: externally-managed-environment"


class Machine:
    """Stands in for the system: records each call and plays the system's part."""

    def __init__(self, root: Path) -> None:
        self.root, self.venv = root, root / ".venv"
        self.calls: list[list[str]] = []
        self.ensurepip = self.pip = True
        self.complete = False
        self.interrupt_at = ""

    def __call__(self, command, root, log, env=None):
        self.calls.append(list(command))
        words = " ".join(command[1:])
        if self.interrupt_at and self.interrupt_at in words:
            raise KeyboardInterrupt
        if "-m venv" in words or "-m virtualenv" in words:
            if "-m venv" in words and not self.ensurepip:
                raise SetupError("venv", got="ensurepip is not available", want="it", remedy="none")
            python = install.interpreter(self.venv)
            python.parent.mkdir(parents=True)
            python.touch()
        if "--target" in words and not self.pip:
            log.write_text("No module named pip", "utf8")
            raise SetupError("pip", got="no pip", want="it", remedy="none")
        if command[0] == sys.executable and "pip install" in words and "--target" not in words:
            raise SetupError("pip", got=PEP_668, want="a venv", remedy="none")
        if words.endswith("-e ."):
            self.complete = True


@pytest.fixture
def machine(tmp_path, monkeypatch):
    (tmp_path / "environment.yml").write_text(
        "dependencies:\n  - pip:\n      - -c constraints.txt\n      - torch\n      - -e .\n"
    )
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    machine = Machine(tmp_path)
    monkeypatch.setattr(install, "call", machine)
    monkeypatch.setattr(install, "lacks", lambda python, root: [] if machine.complete else ["torch"])
    monkeypatch.setattr(install, "version_of", lambda python: sys.version)
    monkeypatch.setattr(install, "room", lambda root: None)
    monkeypatch.setattr(environment, "missing", lambda root: ["torch"])
    return machine


def steps(machine):
    return [" ".join(call[2:4]) for call in machine.calls]


def test_a_fresh_machine_gets_a_venv_with_the_pins(machine, capsys):
    python = install.ensure(machine.root)
    assert python == install.interpreter(machine.venv)
    assert "-c constraints.txt torch" in " ".join(machine.calls[2])
    assert machine.calls[3][-3:] == ["--no-build-isolation", "-e", "."]
    assert (machine.venv / STAMP).read_text("utf8") == environment.stamp(machine.root)
    assert not (machine.venv / MARK).exists()
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["1/4", "2/4", "3/4", "4/4"]
    assert all(line.endswith(" s") for line in said.splitlines()[1:])


def test_a_second_run_installs_nothing(machine):
    install.ensure(machine.root)
    machine.calls.clear()
    install.ensure(machine.root)
    assert machine.calls == []


def test_a_new_pin_is_installed_on_top(machine):
    install.ensure(machine.root)
    machine.calls.clear()
    machine.complete = False
    (machine.root / "constraints.txt").write_text("torch==2.14.0\n")
    install.ensure(machine.root)
    assert not any("venv" in " ".join(call[1:3]) for call in machine.calls)
    assert len(machine.calls) == 3


def test_another_python_starts_over(machine, monkeypatch):
    install.ensure(machine.root)
    machine.calls.clear()
    machine.complete = False
    monkeypatch.setattr(install, "version_of", lambda python: "3.99")
    (machine.root / "constraints.txt").write_text("torch==2.14.0\n")
    install.ensure(machine.root)
    assert machine.calls[0][1:3] == ["-m", "venv"]


@pytest.mark.parametrize("step", ["-m venv", "--upgrade pip", "-c constraints.txt", "-e ."])
def test_an_interrupted_install_is_done_again_from_the_start(machine, step):
    machine.interrupt_at = step
    with pytest.raises(KeyboardInterrupt):
        install.ensure(machine.root)
    assert not (machine.venv / STAMP).exists()
    machine.interrupt_at = ""
    machine.calls.clear()
    install.ensure(machine.root)
    assert machine.calls[0][1:3] == ["-m", "venv"]
    assert len(machine.calls) == 4


def test_a_venv_made_by_hand_is_used_as_it_is(machine):
    python = install.interpreter(machine.venv)
    python.parent.mkdir(parents=True)
    python.touch()
    machine.complete = True
    assert install.ensure(machine.root) == python
    assert machine.calls == []


def test_an_active_environment_that_has_all_is_used(machine, monkeypatch):
    monkeypatch.setattr(environment, "missing", lambda root: [])
    assert install.ensure(machine.root) == Path(sys.executable)
    assert machine.calls == []
    assert not machine.venv.exists()


def test_without_ensurepip_virtualenv_comes_from_a_folder_of_its_own(machine):
    machine.ensurepip = False
    install.ensure(machine.root)
    assert [call[2] for call in machine.calls[:3]] == ["venv", "pip", "virtualenv"]
    assert "--target" in machine.calls[1]  # a system Python refuses pip install without it
    assert install.interpreter(machine.venv).exists()


def test_without_ensurepip_and_pip_the_remedy_is_named(machine):
    machine.ensurepip = machine.pip = False
    with refuses(SetupError, "neither ensurepip nor pip", "apt install python3-venv"):
        install.ensure(machine.root)


def test_an_install_that_lacks_something_is_an_error(machine, monkeypatch):
    monkeypatch.setattr(install, "lacks", lambda python, root: ["torch==2.13.0 (here 2.12.0)"])
    with refuses(SetupError, "torch==2.13.0 (here 2.12.0)"):
        install.ensure(machine.root)
    assert (machine.venv / MARK).exists()


@pytest.mark.parametrize(
    ("said", "got"),
    [
        ("ERROR: [Errno 28] No space left on device", "a full disk"),
        ("Temporary failure in name resolution", "no answer from the package index"),
        ("Could not find a version that satisfies torch (from versions: none)", "no answer from the package index"),
        ("first\nsomething else", "first | something else"),
    ],
)
def test_a_failed_step_names_its_cause(tmp_path, said, got):
    log = tmp_path / "install.log"
    code = f"import sys; print({said!r}); sys.exit(1)"
    with refuses(SetupError, got, "again" if "else" not in said else log):
        install.call([sys.executable, "-c", code], tmp_path, log)


def test_a_step_that_works_leaves_its_words_in_the_log(tmp_path):
    log = tmp_path / "install.log"
    install.call([sys.executable, "-c", "print('fine')"], tmp_path, log)
    assert log.read_text("utf8").strip() == "fine"


PIP = """Installing collected packages: pip
Collecting triton
  Downloading triton-3.7.1-cp311-cp311-manylinux_2_27_x86_64.whl.metadata (1.7 kB)
  Downloading triton-3.7.1-cp311-cp311-manylinux_2_27_x86_64.whl (197.7 MB)
Processing /wheels/torch-2.13.0-cp311-cp311-linux_x86_64.whl (from -r list)
Collecting einops
"""


def test_while_pip_runs_its_log_says_how_far_it_is(tmp_path):
    log, start = tmp_path / "install.log", PIP.index("Collecting")
    log.write_text(PIP, "utf8")
    said = install.far(log, start, 10, elapsed=10.0)
    assert said == "3 of 10 packages chosen, 2 here, now torch, about 30 s left"
    assert install.far(log, len(PIP), 10, elapsed=1.0) == "0 of 10 packages chosen, 0 here"
    log.write_text(PIP + "Installing collected packages: torch", "utf8")
    assert install.far(log, start, 10, elapsed=10.0) == "all 10 packages are here and being installed"


def test_a_small_disk_is_refused_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "DISK_BYTES", 10**18)
    with refuses(SetupError, "GB free", "1000000000 GB"):
        install.room(tmp_path)


def test_another_interpreter_is_asked_what_it_lacks(tmp_path):
    root = Path(__file__).resolve().parents[2]
    assert install.lacks(Path(sys.executable), root) == environment.missing(root)
    assert install.lacks(Path(os.devnull), tmp_path) is None


def test_a_venv_is_not_emptied_by_its_own_python(machine, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(machine.venv))
    monkeypatch.setattr(sys, "_base_executable", "/usr/bin/base", raising=False)
    install.ensure(machine.root)
    assert machine.calls[0] == ["/usr/bin/base", "-m", "venv", str(machine.venv)]
