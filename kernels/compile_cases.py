"""The calls that ``compile_check.py`` compiles: each flag, dtype and path of every launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

# Ampere and Hopper compile every case; the others one of each kind, which saves two of four minutes.  Products of tiles
# take seconds each: all of them only on Hopper.
EVERYWHERE = {
    "norm": (
        "rms bf16 4096", "layer bf16 65536", "dropout add layer bf16 4096", "add layer bf16 stream fp32 8192",
        "dropout add layer bf16 1 x 1", "dropout add layer bf16 1 x 65536",
    ),
    "glu": ("silu bf16", "gelu bf16", "silu bf16 1 x 1"),
    "cross_entropy": ("bf16 131072", "smoothed bf16 131072", "fp32 10"),
    "rope": ("half bf16 128", "interleaved bf16 128", "half fp32 1 x 2"),
    "flash_attention": (
        "causal bf16 64", "everything bf16 128", "causal bf16 256", "causal fp32 64", "decode bf16 128",
        "causal fp32 256", "decode fp32 256",
    ),
}  # fmt: skip


class Case(NamedTuple):
    """One call of a public op, forward and backward."""

    name: str
    call: Callable[[], None]


def norm_cases() -> list[Case]:
    """Return the cases of the norm kernels: each flag, dtype and path of the launcher."""
    import torch

    from handbook_src.kernels import norm

    def case(
        name: str, rows: int, cols: int, *, x: torch.dtype = torch.bfloat16, centre: bool = False,
        affine: bool = True, fused: bool = False, dropout: float = 0.0, stream: torch.dtype | None = None,
    ) -> Case:  # fmt: skip
        def call() -> None:
            a = torch.zeros(rows, cols, dtype=x, requires_grad=True)
            r = torch.zeros(rows, cols, dtype=stream or x, requires_grad=True) if fused else None
            w = torch.ones(cols, dtype=stream or x, requires_grad=True) if affine else None
            b = torch.zeros(cols, dtype=stream or x, requires_grad=True) if affine and centre else None
            y, z = norm.dropout_add_norm_triton(a, r, w, b, dropout=dropout, centre=centre)
            (y.sum() + z.sum() if fused else y.sum()).backward()

        return Case(name, call)

    fp16, fp32 = torch.float16, torch.float32
    layer, drop = {"centre": True}, {"centre": True, "fused": True, "dropout": 0.1}
    return [
        *(case(f"rms bf16 {n}", 8, n) for n in (64, 256, 1024, 4096, 8192, 16384, 32768, 65536)),
        *(case(f"layer bf16 {n}", 8, n, **layer) for n in (1024, 4096, 8192, 32768, 65536)),
        *(case(f"layer fp32 {n}", 8, n, **layer, x=fp32) for n in (4096, 8192, 32768)),
        case("layer fp16 4096", 8, 4096, **layer, x=fp16),
        case("layer bf16 4096 no affine", 8, 4096, **layer, affine=False),
        case("rms bf16 4095", 8, 4095),
        *(case(f"add rms bf16 {n}", 8, n, fused=True) for n in (4096, 8192, 32768)),
        case("add layer fp32 32768", 8, 32768, **layer, fused=True, x=fp32),
        *(case(f"add layer bf16 stream fp32 {n}", 8, n, **layer, fused=True, stream=fp32) for n in (4096, 8192, 32768)),
        *(case(f"dropout add layer bf16 {n}", 8, n, **drop) for n in (1024, 4096, 8192, 16384, 32768, 65536)),
        *(case(f"dropout add layer fp32 {n}", 8, n, **drop, x=fp32) for n in (4096, 8192, 16384)),
        *(case(f"dropout add layer bf16 stream fp32 {n}", 8, n, **drop, stream=fp32) for n in (4096, 8192, 16384)),
        case("dropout add rms bf16 4096", 8, 4096, fused=True, dropout=0.1),
        # sizes of 1 are compiled in as constants, another road through every helper
        case("dropout add layer bf16 1 x 1", 1, 1, **drop),
        case("dropout add layer bf16 1 x 65536", 1, 65536, **drop),
    ]


def glu_cases() -> list[Case]:
    """Return the cases of the gate: each activation and dtype, contiguous and the halves of one projection."""
    import torch

    from handbook_src.kernels import glu

    def case(name: str, activation: str, rows: int, cols: int, x: torch.dtype, packed: bool = False) -> Case:
        def call() -> None:
            both = torch.zeros(rows, 2 * cols, dtype=x)
            halves = (both[:, :cols], both[:, cols:]) if packed else (both[:, :cols].clone(), both[:, cols:].clone())
            glu.glu_triton(*(t.requires_grad_() for t in halves), activation).sum().backward()

        return Case(name, call)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        *(case(f"{a} bf16", a, 64, 11008, bf16) for a in glu.ACTIVATIONS),
        case("silu fp16", "silu", 64, 11008, fp16),
        *(case(f"{a} fp32", a, 64, 11008, fp32) for a in ("silu", "gelu")),
        case("silu bf16 packed 11008", "silu", 64, 11008, bf16, packed=True),
        case("silu bf16 packed 64", "silu", 64, 64, bf16, packed=True),
        case("silu bf16 packed 33", "silu", 64, 33, bf16, packed=True),
        case("silu bf16 1 x 1", "silu", 1, 1, bf16),
    ]


def cross_entropy_cases() -> list[Case]:
    """Return the cases of cross-entropy: vocabularies from digits to 262144, each option and dtype."""
    import torch

    from handbook_src.kernels.cross_entropy import cross_entropy_triton

    def case(name: str, rows: int, cols: int, x: torch.dtype, **options: float) -> Case:
        def call() -> None:
            logits = torch.zeros(rows, cols, dtype=x, requires_grad=True)
            cross_entropy_triton(logits, torch.zeros(rows, dtype=torch.long), **options)[0].sum().backward()

        return Case(name, call)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        *(case(f"bf16 {v}", 64, v, bf16) for v in (10, 1000, 4096, 32000, 50257, 131072, 262144)),
        *(case(f"fp32 {v}", 64, v, fp32) for v in (10, 50257, 131072)),
        case("fp16 32000", 64, 32000, fp16),
        *(
            case(f"smoothed {k} 131072", 64, 131072, x, label_smoothing=0.1)
            for k, x in (("bf16", bf16), ("fp32", fp32))
        ),
        case("z-loss bf16 131072", 64, 131072, bf16, z_loss=1e-4, label_smoothing=0.1),
        case("bf16 1 x 1", 1, 1, bf16),
    ]


def rope_cases() -> list[Case]:
    """Return the cases of the rotary embedding: both pairings, each dtype, partial rotation, odd widths."""
    import torch

    from handbook_src.kernels.rope import rope_triton

    def case(name: str, interleaved: bool, x: torch.dtype, e: int, rotary: int, heads: int = 32, t: int = 8) -> Case:
        def call() -> None:
            a = torch.zeros(1, t, heads, e, dtype=x, requires_grad=True)
            cos, sin = torch.zeros(2, t, rotary // 2)
            rope_triton(a, cos, sin, interleaved).sum().backward()

        return Case(name, call)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        *(
            case(f"{k} bf16 {e}", i, bf16, e, e)
            for k, i in (("half", False), ("interleaved", True))
            for e in (64, 128, 256)
        ),
        *(case(f"{k} fp32 128", i, fp32, 128, 128) for k, i in (("half", False), ("interleaved", True))),
        case("half fp16 128", False, fp16, 128, 128),
        case("half bf16 80 of 80", False, bf16, 80, 80),
        case("half bf16 32 of 128", False, bf16, 128, 32),
        case("interleaved bf16 64 of 192", True, bf16, 192, 64),
        case("half bf16 128 one head", False, bf16, 128, 128, heads=1),
        case("half fp32 1 x 2", False, fp32, 2, 2, heads=1, t=1),
    ]


def flash_attention_cases() -> list[Case]:
    """Return the cases of flash attention: widths of a head, dtypes, each option alone and all together."""
    import torch

    from handbook_src.kernels.flash_attention import flash_attention_triton

    def case(
        name: str, e: int, x: torch.dtype = torch.bfloat16, c: int | None = None, group: int = 1,
        options: tuple[str, ...] = (), t: int = 512,
    ) -> Case:  # fmt: skip
        def call() -> None:
            wide = {"q": (4, e), "k": (4 // group, e), "v": (4 // group, c or e)}
            q, k, v = (torch.zeros(1, t, *size, dtype=x, requires_grad=True) for size in wide.values())
            kwargs: dict[str, Any] = {"causal": True} if "causal" in options else {}
            kwargs |= {"window": 100} if "window" in options else {}
            kwargs |= {"soft_cap": 30.0} if "cap" in options else {}
            kwargs |= {"alibi": torch.ones(4)} if "alibi" in options else {}
            kwargs |= {"sinks": torch.zeros(4, requires_grad=True)} if "sinks" in options else {}
            if "packed" in options:
                edges = torch.tensor([0, t // 2, t], dtype=torch.int32)
                kwargs |= {"cu_q": edges, "cu_k": edges}
            out, lse = flash_attention_triton(q, k, v, **kwargs)
            (out.sum() + lse.sum() if "lse" in options else out.sum()).backward()

        return Case(name, call)

    fp16, fp32 = torch.float16, torch.float32
    every = ("causal", "window", "cap", "alibi", "sinks", "packed")
    return [
        *(case(f"causal bf16 {e}", e, options=("causal",)) for e in (64, 128, 256)),
        case("full bf16 128", 128),
        *(case(f"everything bf16 {e}", e, group=2, options=every) for e in (64, 128, 256)),
        *(case(f"causal fp32 {e}", e, fp32, options=("causal",)) for e in (64, 128, 256)),
        *(case(f"everything fp32 {e}", e, fp32, group=2, options=every) for e in (64, 256)),
        *(case(f"{o} bf16 128", 128, options=(o,)) for o in ("window", "alibi", "sinks", "packed")),
        *(case(f"causal {o} bf16 128", 128, options=("causal", o)) for o in ("window", "cap", "lse")),
        case("causal fp16 128", 128, fp16, options=("causal",)),
        case("causal bf16 80", 80, options=("causal",)),
        case("causal bf16 192 to 128", 192, c=128, options=("causal",)),
        case("causal bf16 1 x 1", 1, options=("causal",), t=1),
        *decode_cases(),
    ]


def decode_cases() -> list[Case]:
    """Return the cases of decoding over pages: widths, a group of heads, every option."""
    import torch

    from handbook_src.kernels.flash_decode import paged_decode_triton

    def case(name: str, e: int, x: torch.dtype = torch.bfloat16, options: bool = False, heads: int = 8) -> Case:
        def call() -> None:
            q, pages = torch.zeros(4, heads, e, dtype=x), torch.zeros(32, 16, 2, e, dtype=x)
            table, lengths = torch.zeros(4, 64, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
            extra = {"alibi": torch.ones(heads), "sinks": torch.zeros(heads), "window": 100, "soft_cap": 30.0}
            paged_decode_triton(q, pages, pages, table, lengths, **(extra if options else {}))

        return Case(name, call)

    fp32 = torch.float32
    return [
        *(case(f"decode bf16 {e}", e) for e in (64, 128, 256)),
        *(case(f"decode fp32 {e}", e, fp32) for e in (64, 128, 256)),
        case("decode everything bf16 128", 128, options=True),
        case("decode everything bf16 256 of 128 heads", 256, options=True, heads=256),
        *(case(f"decode everything fp32 {e} of 128 heads", e, fp32, options=True, heads=256) for e in (64, 256)),
    ]


#: The cases of each kernel, by the stem of its file.
CASES = {
    "norm": norm_cases, "glu": glu_cases, "cross_entropy": cross_entropy_cases, "rope": rope_cases,
    "flash_attention": flash_attention_cases,
}  # fmt: skip
