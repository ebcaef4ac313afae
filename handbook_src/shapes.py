"""One table of axis letters: the same in annotations, einops, comments and prose.

======  ==============================  ======  ==============================
letter  axis                            letter  axis
======  ==============================  ======  ==============================
``b``   batch                           ``e``   features per head
``t``   query position, time            ``f``   hidden width
``s``   key position, source            ``v``   vocabulary
``h``   heads                           ``n``   state
``g``   key-value heads                 ``x``   experts
``d``   features
======  ==============================  ======  ==============================

Whole words stand where letters clash: ``height width nodes edges channels groups``.
Batch comes first and features last; attention speaks ``b t h e``.
"""

from __future__ import annotations

#: The table above, for code that prints or checks it.
AXES = {
    "b": "batch",
    "t": "query position, time",
    "s": "key position, source",
    "h": "heads",
    "g": "key-value heads",
    "d": "features",
    "e": "features per head",
    "f": "hidden width",
    "v": "vocabulary",
    "n": "state",
    "x": "experts",
}
