"""Persona SDK: one frozen language model, a different one for every user."""

__version__ = "0.1.0"
