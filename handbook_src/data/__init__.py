"""Data: text, digits, toy tasks, byte-pair encoding.

The public names stand in ``__init__.pyi``, each with its file; a file is loaded when its name is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
