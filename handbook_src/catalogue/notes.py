"""What the cards of planned components say: formulas and values from the papers.

A note is dropped from the card as soon as the component's own docstring says the
same, so each entry here is a loan until the component is published.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """Lines of a card; ``typical`` names the paper that each value is from."""

    what: str = ""
    formula: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    typical: tuple[str, ...] = ()


NOTES: dict[str, Note] = {
    "glu": Note(
        what="A feed-forward layer one half of which gates the other. The activation names the variant: "
        "GLU sigmoid, ReGLU ReLU, GEGLU GELU, SwiGLU Swish (SiLU).",
        formula=(
            r"\mathrm{GLU}(x) = \sigma(x W + b) \odot (x V + c)",
            r"\mathrm{FFN}_{\mathrm{SwiGLU}}(x) = (\mathrm{SiLU}(x W) \odot x V)\, W_2",
        ),
        shapes=("x: (*lead d)", "W, V: (d f)", "W_2: (f d)", "returns: (*lead d)"),
        typical=(
            "f = 8/3 d instead of 4 d, so that three matrices cost what two did (Shazeer 2020, section 3); "
            "LLaMA 7B has d = 4096, f = 11008 and no biases.",
            "PaLM and LLaMA use SwiGLU; GPT-2 and GPT-3 use a plain GELU feed-forward.",
        ),
    ),
    "silu": Note(
        what="The input times its own sigmoid; with a slope beta inside it is Swish.",
        formula=(r"\mathrm{SiLU}(x) = x\,\sigma(x), \qquad \mathrm{Swish}_\beta(x) = x\,\sigma(\beta x)",),
        shapes=("x: (*lead)", "returns: (*lead)"),
        typical=("beta = 1 (then it is SiLU).",),
    ),
    "gelu": Note(
        what="The input times the probability that a standard normal lies below it.",
        formula=(
            r"\mathrm{GELU}(x) = x\,\Phi(x) = \tfrac{x}{2}\,(1 + \mathrm{erf}(x / \sqrt 2))",
            r"\mathrm{GELU}_{\tanh}(x) = \tfrac{x}{2}\,(1 + \tanh(\sqrt{2/\pi}\,(x + 0.044715\,x^3)))",
        ),
        shapes=("x: (*lead)", "returns: (*lead)"),
        typical=("GPT-2 takes the tanh form, BERT and ViT the exact one.",),
    ),
    "rope": Note(
        what="Queries and keys are rotated by an angle that grows with the position, so scores depend on i - j.",
        formula=(r"q'_{i,2k:2k+2} = R(i\,\theta_k)\, q_{i,2k:2k+2}, \qquad \theta_k = b^{-2k/e}",),
        shapes=("q: (b t h e)", "k: (b s h e)", "returns: as given; e is even"),
        typical=("b = 10000 (Su et al. 2021); 500000 in Llama 3.",),
    ),
    "alibi": Note(
        what="A penalty linear in the distance is added to the scores; each head has its own slope.",
        formula=(r"s_{ij} = q_i \cdot k_j / \sqrt e - m_h\,(i - j), \qquad m_h = 2^{-8 h / H},\ h = 1 \dots H",),
        shapes=("scores: (b h t s)",),
        typical=("The slopes are fixed, for H a power of two as above (Press et al. 2021).",),
    ),
    "gqa": Note(
        what="Groups of query heads share one key-value head; the cache shrinks by heads / kv_heads.",
        formula=(
            r"o_h = \mathrm{softmax}(q_h k_{g(h)}^\top / \sqrt e)\, v_{g(h)}, \qquad g(h) = \lfloor h\,G/H \rfloor",
        ),
        shapes=("q: (b t h e)", "k, v: (b s g e)", "returns: (b t h e); g divides h"),
        typical=("g = 8 in Llama 2 70B and Llama 3; g = 1 is multi-query, g = h full attention.",),
    ),
    "mqa": Note(
        what="All query heads share one key head and one value head.",
        formula=(r"o_h = \mathrm{softmax}(q_h k^\top / \sqrt e)\, v",),
        shapes=("q: (b t h e)", "k, v: (b s 1 e)", "returns: (b t h e)"),
    ),
    "adamw": Note(
        what="Adam whose weight decay acts on the weights directly and not through the gradient's moments.",
        formula=(
            r"m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2",
            r"\theta_t = \theta_{t-1} - \eta\,(\hat m_t / (\sqrt{\hat v_t} + \varepsilon) + \lambda\,\theta_{t-1})",
        ),
        typical=(
            "betas (0.9, 0.999), eps 1e-8 (Kingma & Ba 2014); for language models beta2 = 0.95 and "
            "lambda = 0.1 (Brown et al. 2020).",
        ),
    ),
    "adam": Note(
        what="Steps by the gradient's running mean over the root of its running square, both unbiased.",
        formula=(
            r"m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2",
            r"\theta_t = \theta_{t-1} - \eta\,\hat m_t / (\sqrt{\hat v_t} + \varepsilon), \qquad "
            r"\hat m_t = m_t / (1-\beta_1^t),\ \hat v_t = v_t / (1-\beta_2^t)",
        ),
        typical=("eta 1e-3, betas (0.9, 0.999), eps 1e-8 (Kingma & Ba 2014).",),
    ),
    "lora": Note(
        what="The frozen weight gets a trained update of low rank.",
        formula=(r"y = W x + \tfrac{\alpha}{r}\, B A x, \qquad B = 0 \text{ at the start}",),
        shapes=("W: (out in)", "A: (r in)", "B: (out r)"),
        typical=("r = 4 to 8 on the query and value projections (Hu et al. 2021).",),
    ),
    "dilated-conv": Note(
        what="A convolution whose taps stand r apart: a wider view for the same weights.",
        formula=(r"y_i = \sum_{j=0}^{k-1} w_j\, x_{i + r j}, \qquad \text{receptive field } k + (k-1)(r-1)",),
        typical=("r doubles from layer to layer: 1, 2, 4, 8, ... (Yu & Koltun 2015).",),
    ),
    "transposed-conv": Note(
        what="The adjoint of a strided convolution: it grows the map, it does not invert the convolution.",
        formula=(
            r"\text{size}_{out} = (\text{size}_{in} - 1)\,\text{stride} - 2\,\text{padding} "
            r"+ \text{dilation}\,(k-1) + \text{output\_padding} + 1",
        ),
        typical=("k divisible by the stride avoids the uneven overlap behind checkerboards.",),
    ),
    "moe": Note(
        what="A router sends each token to k of n feed-forward experts and adds what they return.",
        formula=(r"y = \sum_{i \in \mathrm{TopK}(g(x))} g_i(x)\, E_i(x)",),
        shapes=("x: (*lead d)", "router: (d n)", "returns: (*lead d)"),
        typical=("k = 2 of n = 8 in Mixtral (Jiang et al. 2024); k = 1 in Switch.",),
    ),
    "dropout": Note(
        what="While training, each entry is set to 0 with probability p and the others are scaled up.",
        formula=(r"y_i = x_i\, m_i / (1-p), \qquad m_i \sim \mathrm{Bernoulli}(1-p)",),
        shapes=("x: (*lead)", "returns: (*lead)"),
        typical=("p = 0.5 for dense layers (Srivastava et al. 2014); 0.1 in the Transformer (Vaswani et al. 2017).",),
    ),
    "lstm": Note(
        what="A recurrent cell whose memory is changed by gates: forget, write, read.",
        formula=(
            r"i, f, o = \sigma(W_{\{i,f,o\}} x_t + U_{\{i,f,o\}} h_{t-1} + b_{\{i,f,o\}}), \quad "
            r"\tilde c = \tanh(W_c x_t + U_c h_{t-1} + b_c)",
            r"c_t = f \odot c_{t-1} + i \odot \tilde c, \qquad h_t = o \odot \tanh(c_t)",
        ),
        shapes=("x: (b t d)", "h, c: (b f)", "returns: (b t f)"),
        typical=("Forget bias 1 at the start (Gers et al. 2000 argue for a positive one).",),
    ),
    "cross-entropy": Note(
        what="The surprise of the true class under the softmax of the logits.",
        formula=(r"L = -\log \frac{e^{z_y}}{\sum_j e^{z_j}} = -z_y + \mathrm{logsumexp}(z)",),
        shapes=("logits: (*lead v)", "target: (*lead) int", "returns: () float"),
        typical=("A fresh classifier over v classes starts near ln v.",),
    ),
}
