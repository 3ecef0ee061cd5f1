"""The words that choices are made of."""

from __future__ import annotations

from typing import Literal, get_args

Auto = Literal["auto"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float64"]
LayerMapping = Literal["cka", "first", "medium", "last"]
Measure = Literal["cka", "mean-cca", "squared-cca", "pwcca", "procrustes"]
HeadMapping = Literal["hungarian", "identity"]
Transfer = Literal["embedding", "identity"]
Method = Literal["auto", "copy", "lstsq", "paper", "distill"]
Fill = Literal["none", "zero", "nearest"]
DistillControl = Literal["none", "shuffled", "flipped", "rotated"]
RefineControl = Literal["none", "shuffled", "shuffled-labels"]

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
ROLES = ATTENTION + MLP
"""Projections by the short names they have in every family."""
MEASURES: tuple[str, ...] = get_args(Measure)
