"""The catalogue: every component and every claim, with where to find its proof.

``components.tsv`` and ``claims.tsv`` beside this file are the tables;
``python -m handbook_src.catalogue --help`` reads them at the command line.
"""

from __future__ import annotations

from handbook_src.catalogue.table import Claim, Component, claims, component, components

__all__ = ["Claim", "Component", "claims", "component", "components"]
