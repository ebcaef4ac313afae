"""Pure functions: the maths of each component, and beside it what it refuses and what runs faster.

The public names stand in ``__init__.pyi``, each with its file; a file is loaded when its name is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
