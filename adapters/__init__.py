"""Placeholder docstring."""

if __name__ != "persona_sdk.adapters":
    raise ImportError("Import this package as persona_sdk.adapters; 'adapters' would be a second copy of every class.")
