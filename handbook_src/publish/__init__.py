"""The press: from text chapters to executed notebooks, a site, and the proof of both.

``command``, ``environment`` and ``install`` run before anything is installed and
use the standard library only. The rest runs inside the environment that they make.
"""
