"""Keys and values of prompt prefixes, kept and reused.

keys.py       what makes two prefixes the same: composition key and block hashes
bundles.py    keys and values outside the pool: shape, views, erasure
cache.py      the host tier, by bytes, with a disk behind it
rotation.py   keys moved to another position, for blocks in any order
frequency.py  whether a model's keys can be moved
reuse.py      which tokens of a prompt keep what was computed apart
assembly.py   one such prompt on its way through the passes
blocks.py     the blocks an engine keeps, and how they come into rows
"""
