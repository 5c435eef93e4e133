"""Observers of a run: console, JSON lines, HTML report, TensorBoard, Weights & Biases."""

from ghostvis_mega.train.observers.base import Observer, Preview, RunInfo, Summary
from ghostvis_mega.train.observers.console import ConsoleLine
from ghostvis_mega.train.observers.jsonlines import JsonLines
from ghostvis_mega.train.observers.tensorboard import TensorBoard
from ghostvis_mega.train.observers.wandb import Wandb

__all__ = [
    "ConsoleLine",
    "JsonLines",
    "Observer",
    "Preview",
    "RunInfo",
    "Summary",
    "TensorBoard",
    "Wandb",
]
