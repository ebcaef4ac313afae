"""A chapter's key changes with what its execution reads, and with nothing else."""

import pytest

from handbook_src.publish import fingerprint
from handbook_src.publish.execute import read
from handbook_src.publish.fingerprint import Fingerprints

USES = "from handbook_src.layers.norm import Norm"


@pytest.fixture
def house(tiny):
    tiny.write("handbook_src/layers/__init__.py", "")
    tiny.write("handbook_src/layers/norm.py", "from handbook_src.functional.norm import norm\nclass Norm: ...\n")
    tiny.write("handbook_src/layers/other.py", "from . import norm\n")
    tiny.write("handbook_src/functional/__init__.py", "")
    tiny.write("handbook_src/functional/norm.py", "def norm(x):\n    from handbook_src.kernels import norm as k\n")
    tiny.write("handbook_src/kernels/__init__.py", "")
    tiny.write("handbook_src/kernels/norm.py", "")
    tiny.write("handbook_src/publish/__init__.py", "")
    return tiny


def key(tiny, *cells, parameters=None, prose="Prose.", tags=()):
    path = tiny.chapter("a", *cells, prose=prose)
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata["tags"] = list(tags)
    return Fingerprints(tiny.book).key(notebook, "book/a", parameters or {})


def changes(tiny, name, *cells):
    """Whether an edit of a file changes the key of these cells."""
    before = key(tiny, *cells)
    path = tiny.root / name
    path.write_text((path.read_text("utf8") if path.exists() else "") + "\n# edited\n", "utf8")
    return key(tiny, *cells) != before


def test_prose_does_not_count_and_code_does(house):
    assert key(house, USES) == key(house, USES, prose="Other prose.")
    assert key(house, USES) != key(house, USES, "1")
    assert key(house, "1", tags=["raises-exception"]) != key(house, "1")
    assert key(house, "1", tags=["hide-input"]) == key(house, "1")


def test_parameters_count(house):
    assert key(house, "1", parameters={"seed": 1}) != key(house, "1")


@pytest.mark.parametrize(
    "name",
    [
        "handbook_src/layers/norm.py",
        "handbook_src/layers/__init__.py",
        "handbook_src/functional/norm.py",
        "handbook_src/kernels/norm.py",  # imported inside a function
        "handbook_src/layers/sizes.json",  # data beside a module
    ],
)
def test_what_is_imported_directly_or_not_counts(house, name):
    assert changes(house, name, USES)


@pytest.mark.parametrize("name", ["handbook_src/layers/other.py", "handbook_src/publish/__init__.py", "README.md"])
def test_what_is_not_imported_does_not_count(house, name):
    assert not changes(house, name, USES, "import handbook_src.publish")


@pytest.mark.parametrize(
    "cell",
    [
        "import handbook_src.layers.norm",
        "from handbook_src.layers import norm",
        "import handbook_src\nhandbook_src.layers.norm.Norm()",
        "import importlib\nimportlib.import_module('handbook_src.layers.norm')",
        "%time from handbook_src.layers.norm import Norm\nfrom handbook_src.layers.norm import Norm",
        "from handbook_src.layers import other",  # a relative import further down
    ],
)
def test_every_way_to_import_counts(house, cell):
    assert changes(house, "handbook_src/functional/norm.py", cell)


@pytest.fixture
def public(house):
    house.write("handbook_src/layers/__init__.pyi", "from .norm import Norm as Norm\nfrom .other import norm as norm\n")
    fingerprint.public_face.cache_clear()
    return house


def test_a_public_name_counts_the_one_file_behind_it(public):
    for cell in ("from handbook_src.layers import Norm", "import handbook_src\nhandbook_src.layers.Norm()"):
        assert changes(public, "handbook_src/layers/norm.py", cell)
        assert not changes(public, "handbook_src/layers/other.py", cell)
        assert not changes(public, "handbook_src/layers/__init__.pyi", cell)


def test_a_room_taken_as_a_whole_counts_every_file_behind_its_face(public):
    for cell in ("from handbook_src import layers\nlayers.Norm()", "import handbook_src.layers as L\nL.Norm()"):
        assert changes(public, "handbook_src/layers/other.py", cell)


def test_a_function_with_its_modules_name_is_the_public_one(public):
    assert changes(public, "handbook_src/layers/other.py", "from handbook_src.layers import norm")


def test_files_that_the_code_names_count(house):
    house.write("kernels/norm/results/cpu.csv", "1")
    house.write("book/data.csv", "1")
    cell = "open('../kernels/norm/results/cpu.csv'); open('./data.csv')"
    assert changes(house, "kernels/norm/results/cpu.csv", cell)
    assert changes(house, "book/data.csv", cell)
    assert changes(house, "kernels/norm/results/more.csv", "glob('kernels/norm/results')")
    assert not changes(house, "book/other.csv", cell)


def test_of_the_tables_only_the_rows_that_are_named_count(house):
    house.write("handbook_src/catalogue/__init__.py", "")
    cells = ("from handbook_src.catalogue import claims", "claim('norm-1', 'holds')")
    table = "id\tclaim\nnorm-1\tit is {}\nother-1\tit is {}\n"
    keys = []
    for mine, other in (("fast", "fast"), ("fast", "slow"), ("slow", "slow")):
        house.write("handbook_src/catalogue/claims.tsv", table.format(mine, other))
        keys.append(key(house, *cells))
    assert keys[0] == keys[1] != keys[2]


def test_pinned_versions_count_and_those_of_checkers_do_not(house, monkeypatch):
    house.write("constraints.txt", "numpy==0\nruff==0\n")
    before = key(house, "1")
    versions = {"numpy": "9", "ruff": "9"}
    monkeypatch.setattr(fingerprint, "_versions", fingerprint._versions.__wrapped__)
    real = fingerprint.version
    monkeypatch.setattr(fingerprint, "version", lambda name: versions.get(name) or real(name))
    assert key(house, "1") != before
    del versions["numpy"]
    assert key(house, "1") == before


def test_the_accelerator_counts_by_its_name(house, monkeypatch):
    monkeypatch.setattr(fingerprint, "device_name", lambda device: "H100")
    first = key(house, "1", parameters={"device": "cuda"})
    monkeypatch.setattr(fingerprint, "device_name", lambda device: "H200")
    assert key(house, "1", parameters={"device": "cuda"}) != first


def test_a_cell_that_does_not_parse_leaves_the_others_counted(house):
    assert changes(house, "handbook_src/layers/norm.py", "this is no Python", USES)


def test_a_module_that_does_not_parse_still_counts(house):
    house.write("handbook_src/layers/norm.py", "def (")
    assert changes(house, "handbook_src/layers/norm.py", USES)
