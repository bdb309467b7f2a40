"""Low-rank branches of many adapters in one forward pass: y += B (gate * (A x)), row by row.

sites.py    where branches attach
blocks.py   one adapter = one flat block
tiers.py    device slots, host blocks, disk
rows.py     which row uses which slots with which gates
kernels.py  the branch itself, chosen by measured cost
"""
