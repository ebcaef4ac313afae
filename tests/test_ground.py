"""The ground: errors, axis letters, dispatch, and what a chapter's cells call."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from handbook_src import dispatch, notebook
from handbook_src.catalogue import claims
from handbook_src.errors import ConfigError, DataError, Diverged, HandbookError, KernelUnavailable, ShapeError
from handbook_src.judge import Judgement
from handbook_src.shapes import AXES
from handbook_src.testing import refuses


@pytest.mark.parametrize("error", [ConfigError, ShapeError, DataError, KernelUnavailable, Diverged])
def test_an_error_says_what_got_want_and_remedy(error):
    e = error("eps", got=-1.0, want="a positive number", remedy="Use 1e-5.")
    assert str(e) == "eps: got -1.0, want a positive number. Use 1e-5."
    assert isinstance(e, HandbookError)
    twin = pickle.loads(pickle.dumps(e))  # pytest-xdist and process pools send errors this way
    assert (type(twin), str(twin), twin.remedy) == (error, str(e), "Use 1e-5.")


def test_bad_input_is_a_value_error_too():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ShapeError, ValueError)
    assert issubclass(DataError, ValueError)


def test_axis_letters_are_single_and_documented():
    import handbook_src.shapes

    for letter, meaning in AXES.items():
        assert len(letter) == 1
        assert f"``{letter}``" in handbook_src.shapes.__doc__
        assert meaning.split(",")[0].split()[0] in handbook_src.shapes.__doc__


def test_the_package_lists_its_rooms_and_no_more():
    import handbook_src

    assert {"layers", "training", "catalogue"} <= set(dir(handbook_src))
    with pytest.raises(AttributeError, match="no_such_room"):
        handbook_src.no_such_room  # noqa: B018


CANDIDATES = {"triton": "a GPU", "torch": None, "reference": None}


def test_auto_takes_the_first_that_can_run():
    assert dispatch.resolve("op", "auto", CANDIDATES) == "torch"
    assert dispatch.resolve("op", "auto", {"reference": None, "torch": None}) == "reference"


def test_a_named_backend_is_taken_or_refused_with_its_reason():
    assert dispatch.resolve("op", "reference", CANDIDATES) == "reference"
    with refuses(KernelUnavailable, "op backend", "'triton'", "a GPU", "auto"):
        dispatch.resolve("op", "triton", CANDIDATES)
    with refuses(ConfigError, "op backend", "'triton'", "['auto', 'reference']"):
        dispatch.resolve("op", "triton", {"reference": None})
    with refuses(KernelUnavailable, "auto", "a GPU"):
        dispatch.resolve("op", "auto", {"triton": "a GPU"})


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in dispatch.needs_for_triton(torch.zeros(1), None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.needs_for_triton(torch.zeros(1)) is None
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert "pip install triton" in dispatch.needs_for_triton(torch.zeros(1))


@pytest.fixture
def shell():
    """A notebook's shell in this process."""
    InteractiveShell.clear_instance()
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def shown(call) -> list[dict]:
    with capture_output() as caught:
        call()
    return [output.data for output in caught.outputs]


def test_setup_makes_the_noise_repeat():
    device = notebook.setup(3, "cpu")
    first = torch.rand(3)
    notebook.setup(3)
    assert torch.equal(first, torch.rand(3))
    assert device == torch.device("cpu")


def test_glue_writes_the_record_that_prose_quotes(shell):
    with capture_output() as caught:
        notebook.glue("loss", 0.5)
    (output,) = caught.outputs
    assert output.data == {"application/papermill.record/text/plain": "0.5"}
    assert output.metadata["scrapbook"] == {"name": "loss", "mime_prefix": "application/papermill.record/"}


def test_a_table_rounds_escapes_and_labels(shell):
    (data,) = shown(lambda: notebook.table([{"norm <b>": "RMS", "loss": 1.23456, "n": 12345}], "A caption"))
    assert "<caption>A caption</caption>" in data["text/html"]
    assert '<th scope="col">norm &lt;b&gt;</th>' in data["text/html"]
    assert "<td>1.23</td><td>12,345</td>" in data["text/html"]
    assert data["text/plain"] == "norm <b>\tloss\tn\nRMS\t1.23\t12,345"


def test_the_spread_of_seeds_is_their_mean_and_sample_deviation():
    assert notebook.spread([1.0, 2.0, 4.0]) == "2.33 ± 1.53"
    assert notebook.spread([1.0, 2.0, 4.0], 0) == "2 ± 2"


def test_a_claim_shows_verdict_figures_and_reason(shell):
    row = claims()[0]
    (data,) = shown(lambda: notebook.claim(row.id, "no evidence", {"gap": 0.12345}, "The spread is wider."))
    record = data[notebook.CLAIM_TYPE]
    assert record == {
        "id": row.id, "verdict": "no evidence", "figures": [["gap", "0.123"]], "because": "The spread is wider.",
    }  # fmt: skip
    assert re.search(r'class="[^"]*no-evidence', data["text/html"])
    assert f'<a href="{row.link}">{row.source}</a>: “{row.quote}”' in data["text/html"]
    assert f"{row.source}: “{row.quote}”" in data["text/plain"]


def test_a_claim_of_ours_is_not_shown_as_literature(shell):
    rows = {c.id: c for c in claims()}
    for id, want in {
        "glu-1": "from the source documents</p>",
        "flash-attention-3": f'from the source documents; compare <a href="{rows["flash-attention-3"].link}">Dao ',
    }.items():
        (data,) = shown(lambda id=id: notebook.claim(id, "holds", {"gap": 1}, "It is so."))
        assert f'<p class="origin">Where it stands: {want}' in data["text/html"]


def test_a_judgement_brings_its_figures_and_an_open_one_settles_nothing(shell):
    found = Judgement("holds", 0.25, 0.125, 0.375, 10, "more by 0.1")
    (data,) = shown(lambda: notebook.claim(claims()[0].id, found, {"loss": 0.5}, "It is so."))
    assert data[notebook.CLAIM_TYPE]["figures"] == [
        ["effect", "0.25"], ["95 % interval", "0.125 to 0.375"], ["samples", "10"], ["rule", "more by 0.1"],
        ["loss", "0.5"],
    ]  # fmt: skip
    (data,) = shown(lambda: notebook.claim(claims()[0].id, replace(found, verdict="open"), because="It is so."))
    assert notebook.CLAIM_TYPE not in data


def test_a_claim_needs_an_id_a_verdict_and_a_figure(shell):
    known = claims()[0].id
    with refuses(ConfigError, "no-such-claim"):
        notebook.claim("no-such-claim", "holds", {"x": 1}, "so")
    with refuses(ConfigError, "maybe"):
        notebook.claim(known, "maybe", {"x": 1}, "so")
    with refuses(ConfigError, known, "no figures"):
        notebook.claim(known, "holds", {}, "so")
