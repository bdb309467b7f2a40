"""Placeholder docstring."""

if __name__ != "persona_sdk.memory":
    raise ImportError("Import this package as persona_sdk.memory; 'memory' would be a second copy of every class.")
