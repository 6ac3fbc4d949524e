"""Torch modules of a ModelSpec, and their weights as safetensors files."""

from tiltyard.models.network import Network
from tiltyard.models.networks import build
from tiltyard.models.weights import load_model, load_weights, save_weights

__all__ = ["Network", "build", "load_model", "load_weights", "save_weights"]
