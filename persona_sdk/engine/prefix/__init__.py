"""Keys and values of prompt prefixes, kept and reused."""
