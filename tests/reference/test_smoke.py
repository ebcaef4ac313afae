"""Every installed reference library imports, each in a process of its own.

The processes are forked from one that has imported torch and no library: what they share is
what each of them would import first anyway; ten of the 22 import torch's compiler too.

One broken wheel breaks others (torchvision's breaks four), and an import that
only works after another one is found out here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from handbook_src.testing import cuda_stub

#: Import name and a line that touches more than the package's front door.
LIBRARIES = {
    "transformers": "m.GPT2LMHeadModel(m.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8))",
    "torchvision": "m.ops.box_iou(torch.rand(2, 4), torch.rand(2, 4))",
    "timm": "m.layers.RmsNorm(4)",
    "torch_geometric": "m.data.Data",
    "diffusers": "m.DDPMScheduler()",
    "peft": "m.LoraConfig()",
    "fla": "None",
    "mambapy": "None",
    "x_transformers": "m.Attention(dim=4, heads=2, dim_head=2)",
    "pytorch_optimizer": "m.Lion([torch.zeros(1, requires_grad=True)])",
    "pytorch_metric_learning": "__import__('pytorch_metric_learning.losses')",
    "torchmetrics": "m.MeanSquaredError()",
    "vector_quantize_pytorch": "m.VectorQuantize(dim=4, codebook_size=4)",
    "torchdiffeq": "m.odeint",
    "ncps": "__import__('ncps.torch')",
    "snntorch": "m.Leaky(beta=0.9)",
    "normflows": "m.distributions.DiagGaussian(2)",
    "entmax": "m.sparsemax(torch.zeros(1, 2))",
    "torchcrf": "m.CRF(2)",
    "scipy": "__import__('scipy.optimize')",
    "sklearn": "__import__('sklearn.datasets').datasets.load_digits()",
    "tokenizers": "m.models.BPE()",
}


#: Forks a process for each line of its input, a library's name and what to touch; says how it ended.
FORKS = """
import gc, json, os, signal, sys, tempfile, warnings
import torch._dynamo
from handbook_src.testing import oracle

gc.freeze()  # or each child walks all of torch at its end, and copies its pages
for request in sys.stdin:
    name, line = json.loads(request)
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            signal.alarm(300)
            os.dup2(said.fileno(), 2)
            m = oracle.load(name)
            warnings.simplefilter("ignore")
            exec(line)
            sys.exit()
        status = os.waitpid(child, 0)[1]
        said.seek(0)
        print(json.dumps([status, said.read().decode()]), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
    """A process with torch and nothing else, which is silent itself."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", FORKS], text=True, env=env, **pipes) as process:
        yield process
        assert process.communicate()[1] == ""


@pytest.mark.parametrize("name", LIBRARIES)
def test_it_imports_alone(name, forks):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (pip install 'handbook-src[reference]')")
    print(json.dumps([name, LIBRARIES[name]]), file=forks.stdin, flush=True)
    status, said = json.loads(forks.stdout.readline())
    assert status == 0, said[-2000:]
    assert said == ""  # a stray line would fail the build of a chapter


cpu_torch = pytest.mark.skipif(
    torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None,
    reason="needs a torch without CUDA and a torchvision",
)


@cpu_torch
@pytest.mark.skipif(not all(map(shutil.which, cuda_stub.TOOLS)), reason=f"needs {' '.join(cuda_stub.TOOLS)}")
def test_torchvisions_own_kernels_work_behind_the_stub():
    from handbook_src.testing import oracle

    ops = oracle.load("torchvision").ops
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.1, 0.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]])
    assert ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(1, 18, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.deform_conv2d, (x, offset, weight))


@cpu_torch
def test_without_a_compiler_models_still_import(tmp_path):
    env = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    code = (
        "from handbook_src.testing import oracle\n"
        "assert oracle.load('torchvision').ops.roi_align\n"
        "oracle.load('transformers').BertModel\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_missing_library_says_which_extra_has_it():
    from handbook_src.testing import oracle

    with pytest.raises(ModuleNotFoundError) as caught:
        oracle.load("no_such_library_at_all")
    assert "handbook-src[reference]" in caught.value.__notes__[0]


def test_dotted_names_give_the_submodule():
    from handbook_src.testing import oracle

    assert oracle.load("scipy.special").expit(0.0) == 0.5
    if importlib.util.find_spec("transformers") is not None:
        assert oracle.load("transformers.loss.loss_utils").ForCausalLMLoss
