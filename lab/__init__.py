"""The laboratory: everything that no paper defines and no training on your own folders needs.

The toy world, the authors' checkpoint files, metrics, scoring networks, teaching figures, variants
of a script (rows of a table, planted faults, exercises), tables, speed. A method script and
common.py work without it.
"""
